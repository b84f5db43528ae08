"""Parameters, FLOPs and memory of a config, before paying for it. Touches no accelerator.

Examples:
  python -m dip_jax info --config=configs/dip.py
  python -m dip_jax info --config=configs/dip.py:512 --mesh=data:8,fsdp:4
  python -m dip_jax info --config=configs/dip.py --json
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
from absl import flags as absl_flags
from clu import parameter_overview
from jax.sharding import AbstractMesh, AxisType

from dip_jax import command_line, cost, optim, sharding, state
from dip_jax.config import Config, Mesh
from dip_jax.errors import UserError
from dip_jax.models import dip


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    command_line.define_config(flags)
    absl_flags.DEFINE_string("mesh", "", "devices to plan for, such as data:8,fsdp:4; default: the config's", flag_values=flags)
    absl_flags.DEFINE_boolean("json", False, "print one JSON object instead of tables", flag_values=flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    jax.config.update("jax_platforms", "cpu")  # a plan must not take an accelerator that another process uses
    config = command_line.read_config(flags)
    facts = describe(config, mesh=read_mesh(flags.mesh) if flags.mesh else config.mesh)
    if flags.json:
        print(json.dumps(facts, indent=2))
        return
    params = jax.eval_shape(dip.from_config(config.model).init, jax.random.key(0))
    print(parameter_overview.get_parameter_overview(params, include_stats=False))
    print(tables(facts))


def describe(config: Config, *, mesh: Mesh) -> dict[str, Any]:
    """Everything that `info` prints, as JSON values.

    Returns:
        parameters, flops_per_image: by part, with "total" and "head" always there (flops: forward pass; "head" is all heads
            together) and parameters["growth_over_dit_only"], a fraction; head_share: of each, a fraction; bytes_per_device:
            params, optimizer, ema, gradients, activations (see `cost.activation_bytes_per_image`) and "total"; mesh: its
            axes; batch_per_device.

    Raises:
        UserError: if the model cannot be built, or the mesh does not divide the batch.
    """
    model = dip.from_config(config.model)
    params = jax.eval_shape(model.init, jax.random.key(0))
    parameters = _with_totals({name: _count(tree) for name, tree in params.items()})
    baseline = dip.from_config(dataclasses.replace(config.model, head="none", placement="post_hoc"))
    growth = parameters["total"] / _count(jax.eval_shape(baseline.init, jax.random.key(0))) - 1
    flops = _with_totals({part: count for part, count in cost.forward_flops(config.model).items() if count})
    grid = _abstract(mesh)
    shards = grid.shape["data"] * grid.shape["fsdp"] * config.optim.accumulate
    if config.data.batch_size % shards:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not split over data x fsdp x optim.accumulate = {shards}: "
            "change one of them"
        )
    memory = _state_bytes(model, config, grid, zero1=mesh.zero1)
    memory["activations"] = config.data.batch_size // shards * cost.activation_bytes_per_image(model)
    return {
        "parameters": {**parameters, "growth_over_dit_only": growth},
        "flops_per_image": flops,
        "head_share": {"parameters": parameters["head"] / parameters["total"], "flops": flops["head"] / flops["total"]},
        "bytes_per_device": {**memory, "total": sum(memory.values())},
        "mesh": dict(grid.shape),
        "batch_per_device": config.data.batch_size // shards,
    }


def read_mesh(text: str) -> Mesh:
    """ "data:8,fsdp:4" as a mesh; axes that are not named are 1.

    Raises:
        UserError: for anything else.
    """
    sizes = dict.fromkeys(sharding.AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition(":")
        if axis not in sizes or not size.isdigit():
            raise UserError(f"--mesh={text}: {item!r} is not AXIS:SIZE with AXIS one of {', '.join(sharding.AXES)}")
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
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    lines += ["", f"per device, mesh {mesh}, {facts['batch_per_device']} images at a time:"]
    lines += [f"  {name:<14}{size / 2**30:>10.3f} GiB" for name, size in facts["bytes_per_device"].items()]
    return "\n".join(lines)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


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


def _state_bytes(model: dip.DiP, config: Config, mesh: AbstractMesh, *, zero1: bool) -> dict[str, int]:
    optimizer = optim.make_optimizer(config.optim, total_steps=config.train.steps)
    abstract = jax.eval_shape(functools.partial(state.create_state, model, optimizer), jax.random.key(0))
    with sharding.use_rules(config.mesh.rules):
        placed = state.state_shardings(model, optimizer, mesh, zero1=zero1)

    def size(arrays: Any, shardings: Any) -> int:
        return sum(jax.tree.leaves(jax.tree.map(_shard_bytes, arrays, shardings)))

    params = size(abstract.params, placed.params)
    return {
        "params": params,
        "optimizer": size(abstract.opt_state, placed.opt_state),
        "ema": size(abstract.ema, placed.ema),
        "gradients": params,
    }


def _shard_bytes(array: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> int:
    return math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize
