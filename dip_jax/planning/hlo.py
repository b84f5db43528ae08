"""Reads a compiled program (XLA's HLO text): every collective and every product, as often as the loops around it run.

XLA's own cost analysis takes the body of a loop once; here a body counts times its trip count, a branch as if it were taken.
TPU programs do not state trip counts (the bound is the constant in the loop's condition), repeat a collective in every fusion
that runs while it is under way, and write a reduce-scatter as an all-reduce in a fusion of that name.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}
_BYTES |= {"f64": 8, "s4": 1, "u4": 1}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str  # its shapes as text
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: row of COLLECTIVES.
        size: bytes of the whole array that it makes or sums, per device and run.
        group: devices that take part together, as positions in the mesh, row by row.
        count: how often it runs per step.
        source: the operation of the model that it serves.
        arrays: shapes of what it makes, as XLA writes them.
        channel: its number in the program; 0 where it has none.
    """

    kind: str
    size: int
    group: tuple[int, ...]
    count: int
    source: str
    arrays: tuple[str, ...]
    channel: int = 0

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step, by the ring algorithm."""
        share = (len(self.group) - 1) / len(self.group)
        return self.size * self.count * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of this shape along which it runs."""
        places = np.array(np.unravel_index(self.group, tuple(mesh.values())))
        return tuple(axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


def collectives(text: str) -> list[Collective]:
    """All collectives between more than one device in a compiled program, in the order of the text."""
    found: list[Collective] = []
    seen: set[int] = set()
    for instruction, count, place in _walk(text):
        kind, channel = instruction.opcode.removesuffix("-start"), channel_of(instruction)
        if kind not in COLLECTIVES or channel in seen:
            continue
        seen |= {channel} - {0}
        scattered = kind == "all-reduce" and "all-reduce-scatter" in place.computation
        group = _group(instruction.rest)
        arrays = [match.group(0) for match in _SHAPE.finditer(instruction.result)]
        if instruction.opcode == "all-gather-start":  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        elif instruction.opcode == "collective-permute-start":  # operand, result, two counters
            arrays = arrays[1:2]
        size = sum(map(_size, arrays)) * (len(group) if kind == "reduce-scatter" else 1)
        kind = "reduce-scatter" if scattered else kind
        if len(group) > 1:
            found.append(Collective(kind, size, group, count, source_of(instruction), tuple(arrays), channel))
    return found


def channel_of(instruction: Instruction) -> int:
    """The number that the program gives a collective; 0 for none."""
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return int(found.group(1)) if found else 0


def source_of(instruction: Instruction) -> str:
    """The operation of the model that an instruction serves; empty where XLA does not say."""
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found.group(1) if found else ""


def flops(text: str) -> int:
    """FLOPs per device of all matrix products and convolutions, 2 per multiply-add."""
    total = 0
    for instruction, count, place in _walk(text):
        shapes = place.shapes
        if instruction.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest).group(1)
            left = _dimensions(shapes[instruction.operands[0]])
            depth = math.prod(left[int(i)] for i in contracted.split(",") if i)
        elif instruction.opcode == "convolution":
            kernel = _dimensions(shapes[instruction.operands[1]])
            labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest).group(1)
            depth = math.prod(size for size, label in zip(kernel, labels, strict=True) if label != "o")
        else:
            continue
        total += 2 * count * math.prod(_dimensions(instruction.result)) * depth
    return total


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an instruction stands."""

    computation: str
    shapes: Mapping[str, str]  # results of the computation's instructions by name


def _walk(text: str) -> Iterator[tuple[Instruction, int, Place]]:
    """Each instruction, how often it runs, and where it stands."""
    entry, found = computations(text)
    runs = count_runs(entry, found)
    for name, instructions in found.items():
        place = Place(name, {instruction.name: instruction.result for instruction in instructions})
        for instruction in instructions:
            if runs[name]:
                yield instruction, runs[name], place


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry, and the instructions of every computation in the order of the text."""
    entry, current, found = "", "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if header := _HEADER.match(line):
            current = header.group(2)
            found[current] = []
            entry = current if header.group(1) else entry
        elif current and (parts := _LINE.match(line)):
            found[current].append(Instruction(*parts.groups()))
    return entry, found


def count_runs(entry: str, found: Mapping[str, Sequence[Instruction]]) -> Mapping[str, int]:
    """How often each computation runs per run of the program."""
    calls = {
        name: [(called, trips) for instruction in instructions for called, trips in called_by(instruction, found)]
        for name, instructions in found.items()
    }
    order: list[str] = []  # callers before what they call

    def visit(name: str) -> None:
        for called, _ in calls[name]:
            if called not in seen:
                seen.add(called)
                visit(called)
        order.append(name)

    seen = {entry}
    visit(entry)
    runs = defaultdict(int, {entry: 1})
    for name in reversed(order):
        for called, trips in calls[name]:
            runs[called] += runs[name] * trips
    return runs


def called_by(instruction: Instruction, found: Mapping[str, Sequence[Instruction]]) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, and how often each."""
    trips = _trips(instruction, found) if instruction.opcode == "while" else 1
    for called in _CALLED.findall(instruction.rest):
        for name in re.findall(r"%([\w.\-]+)", called):
            yield name, trips


def _trips(loop: Instruction, found: Mapping[str, Sequence[Instruction]]) -> int:
    if stated := _TRIPS.search(loop.rest):
        return int(stated.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
    bounds = [re.match(r"(\d+)\)", one.rest) for one in found.get(condition.group(1), ()) if one.opcode == "constant"]
    return max((int(bound.group(1)) for bound in bounds if bound), default=1)


def _group(rest: str) -> tuple[int, ...]:
    """A group of devices that takes part; the others are like it."""
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", rest):
        moved = [tuple(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs.group(1))]
        return tuple(sorted(next(((a, b) for a, b in moved if a != b), (0,))))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return _numbers(listed.group(1))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S+)", rest):
        return tuple(_iota(iota.group(2)).reshape(_numbers(iota.group(1)))[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?\s*\{([^}]*)\}", rest):
        sizes, ids, wanted = mesh.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
        devices = (_iota(ids) if ids else np.arange(math.prod(sizes.values()))).reshape(tuple(sizes.values()))
        return tuple(_along(devices, list(sizes), wanted).reshape(-1).tolist())
    return (0,)


def _iota(text: str) -> np.ndarray:
    """ "[4,2]T(1,0)": numbers from 0 in that shape, transposed."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _along(devices: np.ndarray, names: list[str], wanted: str) -> np.ndarray:
    """The devices along the axes in "'axis_0', 'axis_2':(2)4", where (2)4 is the part of 4 inside parts of 2."""
    index: list[slice | int] = []
    shape: list[int] = []
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", wanted)}
    for name, size in zip(names, devices.shape, strict=True):
        before, part = parts.get(name, ("1", "1"))
        before, part = (int(before), int(part)) if part else (1, size)
        shape += [before, part, size // (before * part)]
        index += [0, slice(None), 0]
    return devices.reshape(shape)[tuple(index)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _size(shape: str) -> int:
    kind = _SHAPE.search(shape).group(1)
    return math.prod(_dimensions(shape)) * _BYTES.get(kind, 1 if kind.startswith("f8") else 4)


def _dimensions(shape: str) -> list[int]:
    return [int(n) for n in _SHAPE.search(shape).group(2).split(",") if n]
