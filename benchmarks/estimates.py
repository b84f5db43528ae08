"""What XLA's compilers for TPUs and GPUs make of a program, on any machine: estimated time by part, and what is not arithmetic.

    python benchmarks/estimates.py --machine=v5p-8 --batch=128                       the training step, 32 images per chip
    python benchmarks/estimates.py --machine=v6e-1 --job=sample --batch=64           one trajectory
    python benchmarks/estimates.py --machine=h100x8 --batch=256 --variants="few:depth=2"
    python benchmarks/estimates.py --machine=v5p-8 --trust                           two known programs beside the chip's peaks
    python benchmarks/estimates.py --machine=v5p-8 --read=FILE                       a program that --keep wrote

Needs the wheel of that compiler (docs/scaling.md). A variant is name:key=value,... of fields of `config.Model`. TPU: the
compiler's own count of cycles for one core, at the clock of `dip_jax/planning/topologies.py`, without waiting for memory or
network: it ranks variants and finds waste, and is no measurement. GPU: there is no estimate, so launches are counted, by part
and kind.
"""

import argparse
import functools
import os
import pathlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
import measuring

from dip_jax import config
from dip_jax.planning import ahead, cycles, hlo, topologies
from dip_jax.runtime.accelerators import ACCELERATORS

# Part of what is neither head, blocks nor embeddings -> what the names of its operations contain; the first that fits.
REST = {
    "noise": r"random|normal|threefry|erf_inv|uniform|shuffle",
    "norm": r"/(reduce_sum|square|sqrt|norm)\b",
    "conversions": r"convert_element_type",
}
MOVES = ("copy", "copy-start", "transpose", "bitcast-convert", "slice", "dynamic-slice", "reshape")
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call", "after-all", "partition-id")
# What is counted of a GPU's program -> names of such kernels. At a conditional the host waits for the device.
KINDS = {
    "kernels": r"^(?!conditional|.*-(start|done)$)",
    "products": r"gemm|__cublas|^dot$",
    "convolutions": r"__cudnn\$conv",
    "attention": r"fmha",
    "moves": r"^(?!.*-(start|done)$).*(copy|transpose|(?<!update[_-])slice|concatenate|reshape)|^pad|^broadcast",
    "waits": r"^conditional",
}
SIDE, LONG = 8192, 2**29  # the known programs: a product of square matrices, numbers copied; bfloat16


def rest(text: str) -> Counter[str]:
    """Cycles of what `cycles.by_part` calls the update and the rest, by `REST`; "else" is what no row fits."""
    found: Counter[str] = Counter()
    for spent, _, one in cycles.costs(text):
        source = hlo.source_of(one)
        if not any(re.search(pattern, source) for pattern in cycles.PARTS.values()):
            found[next((part for part, pattern in REST.items() if re.search(pattern, source)), "else")] += spent
    return found


def moves(text: str) -> int:
    """Cycles of operations, or of fusions named after them, that only move numbers."""
    return sum(
        spent
        for spent, _, one in cycles.costs(text)
        if one.opcode in MOVES or (one.opcode == "fusion" and re.match(r"(copy|transpose|slice|bitcast)[\w.]*fusion", one.name))
    )


def launches(text: str) -> Counter[tuple[str, str]]:
    """What a GPU's program starts per run, by (part of the model, kind); operations inside of fusions are not counted.

    Of a conditional's branches the one that starts most beside copies counts: only one is taken.
    """
    entry, found = hlo.computations(text)

    @functools.cache
    def of(name: str) -> Counter[tuple[str, str]]:
        counted: Counter[tuple[str, str]] = Counter()
        for one in found[name]:
            inside = (
                [(of(called), times) for called, times in hlo.called_by(one, found)] if one.opcode in cycles.CONTROL else []
            )
            if one.opcode == "conditional":
                inside = [max(inside, key=lambda branch: sum(n for (_, kind), n in branch[0].items() if kind != "copy"))]
            for part, times in inside:
                counted.update({key: n * times for key, n in part.items()})
            if one.opcode not in FREE:
                library = re.search(r'custom_call_target="([^"]+)"', one.rest)
                fusion = re.sub(r"[._\d]+$", "", one.name) if one.opcode == "fusion" else one.opcode
                counted[cycles.part_of(hlo.source_of(one)), library.group(1) if library else fusion] += 1
        return counted

    return of(entry)


def told(counted: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """`launches` of each part as few numbers, by `KINDS`."""
    rows: dict[str, dict[str, int]] = {}
    for (part, kind), n in counted.items():
        row = rows.setdefault(part, dict.fromkeys(KINDS, 0))
        for name, pattern in KINDS.items():
            row[name] += n if re.search(pattern, kind) else 0
    return rows


def describe(text: str, topology: topologies.Topology, rows: int) -> dict:
    """Prints and returns what one program says."""
    if not topology.is_tpu:
        counted = launches(text)
        short = told(counted)
        print(measuring.table((*KINDS, "part"), [[*row.values(), part] for part, row in short.items()]))
        print(measuring.table(("runs", "kind", "part"), [[n, kind, part] for (part, kind), n in counted.most_common(rows)]))
        return {"launches": short, "kinds": [[*key, n] for key, n in counted.most_common()]}
    spent, scale = cycles.by_part(text), 1e3 / topology.clock
    parts = {part: n * scale for part, n in spent.items()}
    inside = {f"of the rest: {part}": n * scale for part, n in rest(text).most_common()}
    total, moved = sum(parts.values()), moves(text) * scale
    shown = {"total": total, **parts, **inside, "of all: moves alone": moved}
    print(measuring.table(("ms", "share", "part"), [[n, n / total, part] for part, n in shown.items()]))
    dearest = cycles.costs(text)[:rows]
    lines = [[n * scale, runs, one.name[:40], one.result[:60], hlo.source_of(one)[-80:]] for n, runs, one in dearest]
    print(measuring.table(("ms", "runs", "operation", "result", "of the model"), lines))
    return {"milliseconds": shown, "cycles": spent, "clock": topology.clock}


def trust(topology: topologies.Topology) -> list[dict]:
    """A large product and a copy on one chip: the estimate's rate beside the chip's peak."""
    os.environ.update(topologies.environment(topology))  # before the compiler is loaded
    place = jax.sharding.SingleDeviceSharding(topologies.describe_devices(topology)[0])
    square, long = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((SIDE, SIDE), (LONG // 1024, 1024)))
    peak = ACCELERATORS[topology.generation]
    work = {
        "product": (jnp.matmul, (square, square), 2 * SIDE**3, peak.flops),
        "copy": (jnp.negative, (long,), 2 * 2 * LONG, peak.memory_rate),
    }
    found = []
    for what, (function, operands, amount, rate) in work.items():
        text = jax.jit(function).lower(*operands).compile().as_text()
        seconds = sum(spent for spent, _, _ in cycles.costs(text)) / topology.clock
        found.append({"program": what, "seconds": seconds, "rate": amount / seconds, "of_peak": amount / seconds / rate})
    print(measuring.table(tuple(found[0]), [list(row.values()) for row in found]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=topologies.parse, required=True, help="as `info --topology`")
    parser.add_argument("--job", choices=ahead.JOBS, default="train")
    parser.add_argument("--batch", type=int, default=128, help="images of all chips together; of one host, for sampling")
    parser.add_argument("--variants", default="base")
    parser.add_argument("--rows", type=int, default=20, help="operations shown, the dearest first")
    parser.add_argument("--keep", help="file for the program of the last variant")
    parser.add_argument("--read", type=pathlib.Path, help="a kept program instead of compiling one")
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.trust:
        trust(options.machine)
        return
    if options.read:
        describe(options.read.read_text(), options.machine, options.rows)
        return
    found = []
    for name, settings in measuring.variants(options.variants).items():
        model = measuring.with_settings(config.Model(), settings)
        asked = config.Config(
            model=model, data=config.Data(batch_size=options.batch), sample=config.Sample(batch_size=options.batch)
        )
        kept = options.keep or str(pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"program_{os.getpid()}.txt")
        done = ahead.compile_ahead(asked, topology=options.machine, job=options.job, keep_text=kept)
        print(f"{name}: mesh {done.mesh}, {done.total_bytes / 2**30:.2f} GiB per device, compiled in {done.seconds[1]:.0f} s")
        said = describe(pathlib.Path(kept).read_text(), options.machine, options.rows)
        found.append({"variant": name, "bytes": done.total_bytes, **said})
    if options.out:
        measuring.save("estimates", measuring.asked(options), found, out=options.out, clock="estimated cycles")


if __name__ == "__main__":
    main()
