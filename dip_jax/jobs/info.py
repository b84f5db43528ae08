"""Parameters, FLOPs and memory of a config, before paying for it. Touches no accelerator.

With --mesh the training step is compiled for so many fake CPU devices (seconds to minutes, no arrays), and memory, collectives
and the predicted time of a step on v5p, v6e, H100 and H200 are added: estimates, as the compiler is the CPU's.

With --topology that machine's own compiler is asked, which runs anywhere (pip install -e '.[aot-tpu]' or '.[aot-gpu]'; one to
three minutes for DiP-XL): memory or what makes it fit, collectives, and for TPUs the compiler's estimate of the time. A TPU
slice is named as it is rented: v5p counts TensorCores, two to a chip, v5e and v6e count chips.

Examples:
  python -m dip_jax info --config=configs/dip.py
  python -m dip_jax info --config=configs/dip.py:512 --mesh=data:8,fsdp:4
  python -m dip_jax info --config=configs/dip.py --mesh=data:64 --config.mesh.zero1=True
  python -m dip_jax info --config=configs/dip.py --topology=v5p-64
  python -m dip_jax info --config=configs/dip.py --topology=2xv5e-256 --mesh=data:64,fsdp:8 --config.data.batch_size=1024
  python -m dip_jax info --config=configs/dip.py --topology=h100x8 --job=sample
  python -m dip_jax info --config=configs/dip.py --json
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags as absl_flags
from clu import parameter_overview
from jax.sharding import AbstractMesh, AxisType

from dip_jax.config import Config, Mesh
from dip_jax.errors import UserError
from dip_jax.metrics import features
from dip_jax.models import cost, dip
from dip_jax.planning import ahead, machine, plan, prediction, topologies
from dip_jax.runtime import accelerators, command_line, sharding
from dip_jax.training import optim, repa, state, workload

_LEAST = 5  # ms: what takes the time of a shorter step is neither products nor links


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    command_line.define_config(flags)
    absl_flags.DEFINE_string("mesh", "", "devices to compile for, such as data:8,fsdp:4", flag_values=flags)
    absl_flags.DEFINE_string("topology", "", "machine to compile for: v5e-16, v5p-64, 2xv5e-256, h100x8, …", flag_values=flags)
    absl_flags.DEFINE_enum("job", "train", ahead.JOBS, "what is compiled for --topology", flag_values=flags)
    absl_flags.DEFINE_boolean("json", False, "print one JSON object instead of tables", flag_values=flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    jax.config.update("jax_platforms", "cpu")  # a plan must not take an accelerator that another process uses
    config = command_line.read_config(flags)
    features.require_known("eval.features", config.eval.features)
    mesh = config.mesh
    if flags.mesh:
        mesh = dataclasses.replace(read_mesh(flags.mesh), zero1=mesh.zero1, rules=mesh.rules)
    if flags.topology:
        _describe_machine(flags, config, mesh)
        return
    if flags.job != "train":
        raise UserError(f"--job={flags.job} needs --topology: without it, only the training step is planned")
    facts = describe(config, mesh=mesh)
    if flags.mesh:
        print(f"compiling the training step for --mesh={flags.mesh}: seconds to minutes", file=sys.stderr, flush=True)
        facts["compiled"] = describe_compiled(config, mesh=mesh, memory=facts["bytes_per_device"])
    if flags.json:
        print(json.dumps(facts, indent=2))
        return
    params = jax.eval_shape(dip.from_config(config.model).init, jax.random.key(0))
    print(parameter_overview.get_parameter_overview(params, include_stats=False))
    print(tables(facts))


def _describe_machine(flags: absl_flags.FlagValues, config: Config, mesh: Mesh) -> None:
    """The facts and tables of --topology."""
    topology = topologies.parse(flags.topology)
    topologies.require_compiler(topology)
    sizes = fill(mesh, devices=topology.devices)
    facts = describe(config, mesh=sizes if flags.job == "train" else Mesh(data=1))
    config = dataclasses.replace(config, mesh=sizes)
    facts["machine"] = machine.describe(config, topology=topology, job=flags.job)
    if flags.json:
        print(json.dumps(facts, indent=2))
        return
    estimate = [*tables(facts).splitlines(), ""] if flags.job == "train" else []
    print("\n".join([*estimate, *machine.lines(facts["machine"])]))
    if flags.job == "train":
        print(f"\n{difference(facts['bytes_per_device']['total'], facts['machine']['bytes_per_device']['needed'])}")


def difference(estimate: int, needed: int) -> str:
    """How far the estimate from shapes is from what the machine's compiler needs, in words."""
    share, shown = estimate / needed - 1, [f"{size / 2**30:.2f} GiB" for size in (estimate, needed)]
    side = "above" if share > 0 else "below"
    return f"the estimate from shapes, {shown[0]}, is {abs(share):.0%} {side} what this compiler needs, {shown[1]}"


def fill(mesh: Mesh, *, devices: int) -> Mesh:
    """The mesh with its -1 replaced by what so many devices leave.

    Raises:
        UserError: if the axes do not multiply to the number of devices.
    """
    known = math.prod(n for n in (mesh.data, mesh.fsdp, mesh.tensor) if n > 0)
    rest = {axis: devices // known for axis in sharding.AXES if getattr(mesh, axis) == -1}
    filled = dataclasses.replace(mesh, **{axis: max(size, 1) for axis, size in rest.items()})
    if math.prod((filled.data, filled.fsdp, filled.tensor)) != devices:
        raise UserError(
            f"mesh data,fsdp,tensor={(filled.data, filled.fsdp, filled.tensor)} does not multiply to the {devices} devices of "
            "--topology: change --mesh, or set one of config.mesh to -1"
        )
    return filled


def describe(config: Config, *, mesh: Mesh) -> dict[str, Any]:
    """Everything that `info` prints, as JSON values.

    Returns:
        parameters, flops_per_image: by part, with "total" and "head" always there (flops: forward pass; "head" is all heads
            together) and parameters["growth_over_dit_only"], a fraction; head_share: of each, a fraction; bytes_per_device:
            params, optimizer, ema, gradients, activations, workspace (see `workload.planned_bytes`), teacher where there is
            one, and "total"; mesh: its axes; batch_per_device; repa: see `_repa`.

    Raises:
        UserError: if the model cannot be built, or the mesh divides the batch or the heads into no whole parts.
    """
    model = dip.from_config(config.model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    parameters = _with_totals({name: workload.count(tree) for name, tree in params.items()})
    baseline = dip.from_config(dataclasses.replace(config.model, head="none", placement="post_hoc"))
    growth = parameters["total"] / workload.count(jax.eval_shape(baseline.init, jax.random.key(0))) - 1
    flops = _with_totals({part: count for part, count in cost.forward_flops(config.model).items() if count})
    grid = _abstract(mesh)
    sharding.check_split(grid.shape, model=config.model, batch_size=config.data.batch_size, accumulate=config.optim.accumulate)
    images = workload.images_at_a_time(config, grid.shape)
    memory = _planned_bytes(model, config, grid, zero1=mesh.zero1, images=images)
    return {
        "parameters": {**parameters, "growth_over_dit_only": growth},
        "flops_per_image": flops,
        "repa": _repa(config),
        "head_share": {"parameters": parameters["head"] / parameters["total"], "flops": flops["head"] / flops["total"]},
        "bytes_per_device": {**memory, "total": sum(memory.values())},
        "mesh": dict(grid.shape),
        "batch_per_device": images,
    }


def describe_compiled(config: Config, *, mesh: Mesh, memory: Mapping[str, int]) -> dict[str, Any]:
    """What the compiled training step needs, as JSON values; slow.

    Args:
        config: what to train.
        mesh: its devices.
        memory: bytes_per_device of `describe`.

    Returns:
        bytes_per_device: state (with the batch), temporaries and total; flops_per_device; collectives: rows of
            `plan.Plan.totals`; predictions: for each accelerator fits, seconds (best, worst: with all or no communication
            hidden behind products), images_per_second (of both), communication_share.

    Raises:
        UserError: as `plan.compile_plan`.
    """
    compiled = plan.compile_plan(config, mesh=mesh)
    total = compiled.state_bytes + compiled.temporary_bytes
    moved = sum(memory[part] for part in ("params", "optimizer", "ema", "gradients"))
    predictions = {}
    for name, device in accelerators.ACCELERATORS.items():
        guess = prediction.predict(
            device, flops=compiled.flops, collectives=compiled.collectives, state_bytes=moved, total_bytes=total
        )
        seconds = (guess.best, guess.worst)
        predictions[name] = {
            "fits": guess.fits,
            "seconds": seconds,
            "images_per_second": [config.data.batch_size / one for one in seconds],
            "communication_share": guess.communication_share,
        }
    return {
        "bytes_per_device": {"state": compiled.state_bytes, "temporaries": compiled.temporary_bytes, "total": total},
        "flops_per_device": compiled.flops,
        "collectives": compiled.totals({axis: getattr(mesh, axis) for axis in sharding.AXES}),
        "predictions": predictions,
    }


def read_mesh(text: str) -> Mesh:
    """ "data:8,fsdp:4" as a mesh; axes that are not named are 1.

    Raises:
        UserError: for anything else.
    """
    sizes = dict.fromkeys(sharding.AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition(":")
        if axis not in sizes or not size.isdecimal() or not int(size):
            raise UserError(
                f"--mesh={text}: {item!r} is not AXIS:SIZE with AXIS one of {', '.join(sharding.AXES)}, SIZE from 1"
            )
        sizes[axis] = int(size)
    return Mesh(**sizes)


def tables(facts: dict[str, Any]) -> str:
    """The totals of `describe` for people."""
    lines = [f"{'part':<14}{'parameters':>16}{'share':>9}{'GFLOP per image':>18}{'share':>9}"]
    parameters, flops = dict(facts["parameters"]), facts["flops_per_image"]
    growth = parameters.pop("growth_over_dit_only")
    for part in [*(name for name in parameters | flops if name != "total"), "total"]:
        count, work = parameters.get(part, 0), flops.get(part, 0)
        shares = f"{count / parameters['total']:>9.3%}", f"{work / flops['total']:>9.2%}"
        lines.append(f"{part:<14}{count:>16,}{shares[0]}{work / 1e9:>18.3f}{shares[1]}")
    lines.append(f"parameters over DiT-only: {growth:+.3%}")
    if of := facts["repa"]:
        teacher, projector = of["teacher_flops"] / 1e9, of["projector_flops"] / 1e9
        lines += [
            f"REPA, weight {of['weight']}: teacher {teacher:.1f}, projector {projector:.1f} GFLOP per image and step "
            f"({of['share_of_step']:+.1%}); {of['projector_parameters']:,} more parameters while training"
        ]
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    lines += ["", f"per device, mesh {mesh}, {facts['batch_per_device']} images at a time:"]
    lines += [f"  {name:<14}{size / 2**30:>10.3f} GiB" for name, size in facts["bytes_per_device"].items()]
    return "\n".join(lines + (_compiled_tables(facts["compiled"]) if "compiled" in facts else []))


def _compiled_tables(compiled: dict[str, Any]) -> list[str]:
    lines = ["", "compiled for CPU devices, which compute bfloat16 in float32: for other devices an estimate from above"]
    lines += [f"  {name:<14}{size / 2**30:>10.3f} GiB per device" for name, size in compiled["bytes_per_device"].items()]
    lines += [f"  {'products':<14}{compiled['flops_per_device'] / 1e12:>10.3f} TFLOP per device and step"]
    lines += ["", f"{'collective':<20}{'axes':<20}{'times':>8}{'GB per step':>14}{'GB sent':>10}"]
    lines += [
        f"{row['kind']:<20}{row['axes']:<20}{row['runs']:>8}{row['bytes'] / 1e9:>14.3f}{row['sent'] / 1e9:>10.3f}"
        for row in compiled["collectives"]
    ] or ["none"]
    title = f"predicted at {prediction.EFFICIENCY:.0%} of the peak FLOPs, {prediction.LINK_EFFICIENCY:.0%} of the links:"
    lines += ["", title, f"{'device':<8}{'fits':>6}{'ms per step':>16}{'images/s':>18}{'communication':>15}"]
    for name, guess in compiled["predictions"].items():
        (low, high), (fast, slow) = (1e3 * second for second in guess["seconds"]), guess["images_per_second"]
        fits, share = "yes" if guess["fits"] else "no", guess["communication_share"]
        time, rate = (f"{low:.0f}-{high:.0f}", f"{slow:,.0f}-{fast:,.0f}") if low >= _LEAST else (f"under {_LEAST}", "-")
        lines.append(f"{name:<8}{fits:>6}{time:>16}{rate:>18}{share:>15.1%}")
    note = f"under {_LEAST} ms a step waits for kernels to start and for images: not predicted"
    return lines + [note] * any("under" in line for line in lines[-len(compiled["predictions"]) :])


def _with_totals(parts: dict[str, int]) -> dict[str, int]:
    """Adds the total, and makes "head" all heads together (0 for none)."""
    total = sum(parts.values())
    heads = parts.get("head", 0) + parts.pop("inject_head", 0)
    return {**parts, "head": heads, "total": total}


def _abstract(mesh: Mesh) -> AbstractMesh:
    """The mesh without its devices; -1 is what this machine has left over."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(jax.device_count() // math.prod(n for n in sizes if n > 0), 1)
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _planned_bytes(model: dip.DiP, config: Config, mesh: AbstractMesh, *, zero1: bool, images: int) -> dict[str, int]:
    optimizer = optim.make_optimizer(config.optim, total_steps=config.train.steps)
    alignment = repa.align(config.repa, config.model)
    with sharding.use_rules(config.mesh.rules):
        options = {"zero1": zero1, "alignment": alignment, "averages": len(config.optim.ema_decays)}
        placed = state.state_shardings(model, optimizer, mesh, **options)
        teacher = repa.abstract_teacher(alignment, mesh) if alignment else {}
    abstract = state.abstract_state(model, optimizer, placed, alignment=alignment)
    return workload.planned_bytes(model, abstract, teacher, images=images, accumulate=config.optim.accumulate)


def _repa(config: Config) -> dict[str, Any] | None:
    """What alignment adds to a training step: FLOPs per image of the teacher (once) and of the projector (three times)."""
    alignment = repa.align(config.repa, config.model)
    if alignment is None:
        return None
    added = workload.alignment_flops(alignment, config.model.image_size)
    parameters = workload.count(jax.eval_shape(alignment.projector.init, jax.random.key(0)))
    return {
        "weight": config.repa.weight,
        "teacher_flops": added["teacher"],
        "projector_flops": added["projector"],
        "projector_parameters": parameters,
        "share_of_step": sum(added.values()) / workload.step_flops(config.model, None),
    }
