"""A config on a machine that is not there: what its compiler says, and the smallest change that makes it fit, in words."""

import dataclasses
from collections import defaultdict
from typing import Any

from dip_jax.config import Config
from dip_jax.planning import ahead
from dip_jax.planning.ahead import Compiled
from dip_jax.planning.topologies import Topology

_GIB = 2**30


def describe(config: Config, *, topology: Topology, job: str, machine_code: bool = True) -> dict[str, Any]:
    """What `info --topology` prints, as JSON values.

    Returns:
        machine, job, devices, mesh; fits; bytes_per_device: available, and state, temporaries and left where it fits, needed
        where not; change: the first of `changes` that fits, {"flags", "needed"}, where it does not (null: none does);
        collectives: rows kind, axes, runs, bytes, beside_products (bytes); cycles and seconds by part (estimates of the TPU's
        compiler for one core, at `clock`); kernels; untiled: see `Compiled`; updated_in_place; compile_seconds; machine_code.

    Raises:
        UserError: as `ahead.compile_ahead`.
    """
    found = ahead.compile_ahead(config, topology=topology, job=job, machine_code=machine_code)
    facts = {"machine": topology.described, "job": job, "devices": topology.devices, "mesh": found.mesh}
    memory = {"available": topology.memory, "needed": found.total_bytes}
    if not fits(found, topology):
        return {
            **facts,
            "fits": False,
            "bytes_per_device": memory,
            "change": smallest_change(config, topology=topology, job=job),
        }
    memory |= {"state": found.state_bytes, "temporaries": found.temporary_bytes, "left": topology.memory - found.total_bytes}
    return {
        **facts,
        "fits": True,
        "bytes_per_device": memory,
        "collectives": _totals(found),
        "cycles": found.cycles,
        "clock": topology.clock,
        "kernels": found.kernels,
        "untiled": found.untiled,
        "updated_in_place": found.aliased,
        "trace_seconds": found.seconds[0],
        "compile_seconds": found.seconds[1],
        "machine_code": machine_code,
    }


def fits(found: Compiled, topology: Topology) -> bool:
    """Whether one device holds it."""
    return not found.needed_bytes and found.total_bytes <= topology.memory


def changes(config: Config, *, devices: int, job: str) -> list[tuple[str, Config]]:
    """What to try where it does not fit, (flags, config), the cheapest in speed first."""
    if job == "sample":
        size, found = config.sample.batch_size, []
        while size > 1:
            size //= 2
            found.append((f"--config.sample.batch_size={size}", _with(config, sample={"batch_size": size})))
        return found
    mesh, parts = config.mesh, config.data.batch_size // (devices // config.mesh.tensor)
    found = []
    zero1 = {} if mesh.zero1 or mesh.fsdp > 1 else {"zero1": True}
    base, said = (_with(config, mesh=zero1), "--config.mesh.zero1=True ") if zero1 and devices > 1 else (config, "")
    if said:
        found.append((said, base))
    if config.model.remat != "full":
        base, said = _with(base, model={"remat": "full"}), said + "--config.model.remat=full "
        found.append((said, base))
    split = 2 * config.optim.accumulate
    while split <= parts and config.data.batch_size % split == 0:
        found.append((f"{said}--config.optim.accumulate={split}", _with(base, optim={"accumulate": split})))
        split *= 2
    return [(text.strip(), changed) for text, changed in found]


def smallest_change(config: Config, *, topology: Topology, job: str) -> dict[str, Any] | None:
    """The first of `changes` that fits, {"flags", "needed"}; None where none does. Compiles each that it tries."""
    for flags, changed in changes(config, devices=topology.devices, job=job):
        found = ahead.compile_ahead(changed, topology=topology, job=job, machine_code=False)
        if fits(found, topology):
            return {"flags": flags, "needed": found.total_bytes}
    return None


def lines(facts: dict[str, Any]) -> list[str]:
    """`describe` for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    what = {"train": "the training step", "sample": "a sampling call, on one host"}[facts["job"]]
    head = [facts["machine"], f"{what}, compiled by this machine's own compiler for the mesh {mesh}"]
    memory = facts["bytes_per_device"]
    if not facts["fits"]:
        change = facts["change"]
        advice = "no change that is known here makes it fit: take more devices"
        if change:
            advice = f"fits with {change['flags']} ({change['needed'] / _GIB:.2f} GiB)"
        need = f"{memory['needed'] / _GIB:.2f} GiB per device, of {memory['available'] / _GIB:.2f}"
        return [*head, f"does not fit: the compiler needs {need}; {advice}"]
    temporaries = "beside them, at the peak" if facts["machine_code"] else "beside them, as allocated"
    shown = [("state", "arguments"), ("temporaries", temporaries), ("left", "of the device's memory")]
    found = [*head, *(f"  {name:<14}{memory[name] / _GIB:>10.3f} GiB  {note}" for name, note in shown)]
    if facts["job"] == "train":
        found.append(f"  the state is {'' if facts['updated_in_place'] else 'NOT '}updated in place")
    finished = "" if facts["machine_code"] else ", without machine code"
    found.append(f"  traced in {facts['trace_seconds']:.0f} s, compiled in {facts['compile_seconds']:.0f} s here{finished}")
    return [*found, *_collective_lines(facts["collectives"]), *_cycle_lines(facts), *_kernel_lines(facts)]


def _collective_lines(rows: list[dict[str, Any]]) -> list[str]:
    title = f"{'collective':<20}{'axes':<20}{'times':>8}{'MB per run':>14}{'beside products':>18}"
    return ["", title] + (
        [
            f"{row['kind']:<20}{row['axes']:<20}{row['runs']:>8}{row['bytes'] / 1e6:>14.3f}"
            f"{row['beside_products'] / max(row['bytes'], 1):>18.0%}"
            for row in rows
        ]
        or ["none"]
    )


def _cycle_lines(facts: dict[str, Any]) -> list[str]:
    if not facts["cycles"]:
        return []
    total = sum(facts["cycles"].values())
    title = (
        f"the compiler's estimate for one core at {facts['clock'] / 1e9:g} GHz, not measured, without waiting for memory and "
        f"network: {1e3 * total / facts['clock']:.1f} ms"
    )
    rows = [f"  {part:<24}{1e3 * n / facts['clock']:>10.2f} ms{n / total:>8.1%}" for part, n in facts["cycles"].items()]
    return ["", title, *rows]


def _kernel_lines(facts: dict[str, Any]) -> list[str]:
    kernels, untiled = facts["kernels"], facts["untiled"]
    note = f"products are cuBLAS's here: without a GPU to try kernels on, XLA found no tiling of its own for {untiled}"
    found = ["", "CUDA's libraries:", *(f"  {name:<40}{count:>6}" for name, count in kernels.items())] if kernels else []
    return [*found, *([note] if untiled else [])]


def _totals(found: Compiled) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"runs": 0, "bytes": 0, "beside_products": 0})
    for one in found.collectives:
        row = rows[one.kind, ",".join(one.axes(found.mesh))]
        row["runs"] += one.count
        row["bytes"] += one.size * one.count
        row["beside_products"] += one.size * one.count * (one.channel in found.hidden)
    named = [{"kind": kind, "axes": axes, **row} for (kind, axes), row in rows.items()]
    return sorted(named, key=lambda row: -row["bytes"])


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    replaced = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **replaced)
