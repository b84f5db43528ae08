"""Compiles the real training step or sampling call with the compiler of a machine that is not there, and reads the result.

`compile_ahead` starts this file as a process of its own: the compilers are told by environment variables what they may touch,
and what they print stays there. Arrays are abstract; no device is started, nothing is read from the network.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from dip_jax.config import Config, Mesh, from_dict, to_dict
from dip_jax.errors import Exit, UserError
from dip_jax.models import dip
from dip_jax.planning import cycles, hlo, overlap, plan, topologies
from dip_jax.planning.topologies import Topology
from dip_jax.runtime import sharding
from dip_jax.sampling import trajectories

JOBS = ("train", "sample")
_FINAL = "*after_optimizations_after_buffer_assignment.txt"  # libtpu's last word before machine code
_POLL = 0.1  # seconds


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a device's own compiler says of one program.

    Attributes:
        mesh: axis sizes of the program.
        state_bytes: arguments as they lie on one device: parameters, optimizer, average, batch.
        temporary_bytes: what lies beside them at the peak, results that replace no argument among it; for TPUs the machine code
            too, where it was made.
        needed_bytes: where it does not fit, what the compiler says that it needs; else 0, and where this is set all else is 0.
        aliased: whether the state is updated in place.
        collectives: of one run.
        hidden: `channel` of those that products run beside.
        cycles: estimated, by part of the model; only for TPUs, and only where machine code was made.
        kernels: calls of CUDA's libraries, by name.
        seconds: of tracing and of compiling, here.
        untiled: a product for which XLA's GPU compiler found no tiling, as it has no device to try any on; all products are
            then cuBLAS's. Empty where it found all.
    """

    mesh: dict[str, int]
    state_bytes: int = 0
    temporary_bytes: int = 0
    needed_bytes: int = 0
    aliased: bool = False
    collectives: tuple[hlo.Collective, ...] = ()
    hidden: tuple[int, ...] = ()
    cycles: dict[str, int] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)
    untiled: str = ""

    @property
    def total_bytes(self) -> int:
        """At the peak, on one device."""
        return self.needed_bytes or self.state_bytes + self.temporary_bytes


def compile_ahead(
    config: Config, *, topology: Topology, job: str = "train", machine_code: bool = True, keep_text: str | None = None
) -> Compiled:
    """Compiles `config`'s training step or sampling call for `topology`.

    Args:
        config: what to train or sample; its mesh is spread over the machine (for sampling over one host of it).
        topology: the machine.
        job: row of JOBS.
        machine_code: compile to the end. False stops libtpu once the program, its layouts and its memory are final, a fifth of
            the time; estimated cycles are then missing, and temporaries are what is allocated, somewhat above the peak.
        keep_text: file for the optimised program.

    Raises:
        UserError: if the compiler is not installed, the step cannot be built for that mesh, or the compiler ends for any
            other reason than memory.
    """
    topologies.require_compiler(topology)
    request = {
        "config": to_dict(config),
        "topology": topology.name,
        "job": job,
        "machine_code": machine_code,
        "keep": keep_text,
    }
    child = subprocess.run(
        [sys.executable, "-m", "dip_jax.planning.ahead"],
        input=json.dumps(request),
        env=os.environ | topologies.environment(topology),
        capture_output=True,
        text=True,
    )
    if child.returncode == Exit.USER_ERROR:
        raise UserError(child.stderr.strip().splitlines()[-1])
    if child.returncode:
        raise UserError(f"the compiler of {topology.name} ended with code {child.returncode}: {_complaint(child.stderr):.400}")
    values = json.loads(child.stdout.splitlines()[-1])
    found = [hlo.Collective(**one | {name: tuple(one[name]) for name in ("group", "arrays")}) for one in values["collectives"]]
    for name in ("hidden", "seconds"):
        values[name] = tuple(values[name])
    return Compiled(**values | {"collectives": tuple(found)})


def _complaint(said: str) -> str:
    """The line of a compiler's last words that names what is wrong: an exception goes on for many lines."""
    lines = said.strip().splitlines() or ["nothing said"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines)[-1]


def lower(config: Config, topology: Topology, job: str) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """The traced program of `job`, and the axis sizes of its mesh.

    Raises:
        UserError: if the mesh does not fit the machine or the config.
    """
    devices = topologies.describe_devices(topology)
    if job == "sample":  # every host draws on its own devices
        mesh = sharding.make_mesh(Mesh(), [one for one in devices if one.process_index == devices[0].process_index])
        lowered = trajectories.lower_draw(dip.from_config(config.model), options=config.sample, mesh=mesh)
    else:
        mesh = sharding.make_mesh(config.mesh, devices)
        lowered = plan.lower_step(config, mesh)
    return lowered, dict(mesh.shape)


def read(text: str, **known: Any) -> Compiled:
    """What the optimised program says; `known` are the other fields of `Compiled`."""
    kernels: dict[str, int] = {}
    for name in re.findall(r'custom_call_target="(__cu[\w$]+)"', text):
        kernels[name] = kernels.get(name, 0) + 1
    return Compiled(
        aliased="input_output_alias={" in text.split("\n", 1)[0],
        collectives=tuple(hlo.collectives(text)),
        hidden=tuple(sorted(overlap.hidden_channels(text))),
        cycles=cycles.by_part(text),
        kernels=kernels,
        **known,
    )


def read_allocations(text: str) -> tuple[int, int]:
    """(arguments, all else) in bytes of device memory, from libtpu's buffer assignment."""
    sizes = [0, 0]
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*):$", text, flags=re.MULTILINE):
        if not re.search(r"\bcolor [1-9]", kind):  # memory on the chip itself
            sizes["parameter" not in kind] += int(size)
    return sizes[0], sizes[1]


def _needed(message: str) -> int:
    """Bytes that an out-of-memory message names; 0 for any other message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return 0
    found = re.search(r"\(([\d.]+)([KMG])\) exceeds|Used ([\d.]+)([KMG])", message)
    number, unit = [part for part in found.groups() if part] if found else ("0", "G")
    return max(int(float(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit]), 1)


def _untiled(message: str) -> str:
    """The product, by its name in the model, for which a message says that there is no tiling; empty for any other message."""
    found = re.search(r'Couldn\'t find output tile sizes .*?op_name="([^"]*)"', message)
    return found.group(1) if found else ""


def _compile(
    lowered: jax.stages.Lowered, *, known: dict[str, Any], machine_code: bool, keep: str | None, untiled: str = ""
) -> Compiled:
    began = time.monotonic()

    def done(text: str, state: int, other: int) -> Compiled:
        if keep:
            pathlib.Path(keep).write_text(text)
        seconds = (known["traced"], time.monotonic() - began)
        return read(text, mesh=known["mesh"], state_bytes=state, temporary_bytes=other, seconds=seconds, untiled=untiled)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options: dict[str, Any] = {} if machine_code else {"xla_dump_to": folder}
        options |= {"xla_gpu_enable_triton_gemm": False} if untiled else {}
        future = concurrent.futures.ThreadPoolExecutor(1).submit(lowered.compile, options)
        while not future.done():
            time.sleep(_POLL)
            final = [] if machine_code else list(pathlib.Path(folder).glob(_FINAL))
            if final and (text := final[0].read_text()).rstrip().endswith("}"):
                assigned = next(pathlib.Path(folder).glob("*after_optimizations-buffer-assignment.txt"))
                return done(text, *read_allocations(assigned.read_text()))
        try:
            compiled = future.result()
        except jax.errors.JaxRuntimeError as error:
            if needed := _needed(str(error)):
                return Compiled(known["mesh"], needed_bytes=needed, seconds=(known["traced"], time.monotonic() - began))
            if untiled or not (product := _untiled(str(error))):
                raise
            return _compile(lowered, known=known, machine_code=machine_code, keep=keep, untiled=product)
    memory = compiled.memory_analysis()
    other = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if known["tpu"]:  # its sum of temporaries counts more than ever lies there at once
        other = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return done(compiled.as_text(), memory.argument_size_in_bytes, other)


def _main() -> int:
    request = json.loads(sys.stdin.read())
    config, topology = from_dict(request["config"]), topologies.parse(request["topology"])
    began = time.monotonic()
    try:
        lowered, mesh = lower(config, topology, request["job"])
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return Exit.USER_ERROR
    known = {"mesh": mesh, "traced": time.monotonic() - began, "tpu": topology.is_tpu}
    found = _compile(lowered, known=known, machine_code=request["machine_code"] or not topology.is_tpu, keep=request["keep"])
    print(json.dumps(dataclasses.asdict(found)), flush=True)
    return Exit.DONE


if __name__ == "__main__":
    os._exit(_main())  # a compiler that was stopped early is still at work on another thread
