"""Compiles the real training step for devices that are not there, and reads from it what a step needs.

`compile_plan` starts this file as a process of its own, because the number of (fake, CPU) devices of a process is fixed when
JAX starts. Arrays are abstract: only the compiler's own memory is used.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dip_jax.config import Config, Mesh, from_dict, to_dict
from dip_jax.errors import Exit, UserError
from dip_jax.models import dip
from dip_jax.planning import hlo
from dip_jax.runtime import sharding, target
from dip_jax.training import optim, repa, state, step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one compiled step needs.

    Attributes:
        state_bytes: parameters, optimizer, average and the batch, as they lie on one device.
        temporary_bytes: what XLA holds beside them at the peak: activations, gradients, workspace; float32 where a CPU
            has no bfloat16.
        flops: products per device and step, as compiled: with what is recomputed and what a tensor axis repeats.
        collectives: of one step.
    """

    state_bytes: int
    temporary_bytes: int
    flops: int
    collectives: tuple[hlo.Collective, ...]

    def totals(self, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
        """Rows kind, axes, runs, bytes, sent: the collectives of a step summed by kind and mesh axes, the largest first."""
        rows: dict[tuple, dict[str, float]] = defaultdict(lambda: {"runs": 0, "bytes": 0, "sent": 0.0})
        for one in self.collectives:
            row = rows[one.kind, ",".join(one.axes(mesh))]
            row["runs"] += one.count
            row["bytes"] += one.size * one.count
            row["sent"] += one.sent
        named = [{"kind": kind, "axes": axes, **row, "sent": round(row["sent"])} for (kind, axes), row in rows.items()]
        return sorted(named, key=lambda row: -row["sent"])


def compile_plan(config: Config, *, mesh: Mesh) -> Plan:
    """Compiles `config`'s training step for `mesh`, whose sizes must all be given.

    Raises:
        UserError: if the step cannot be built for that mesh, or the compiler ends (out of memory, usually).
    """
    count = math.prod((mesh.data, mesh.fsdp, mesh.tensor))
    request = json.dumps(to_dict(dataclasses.replace(config, mesh=mesh)))
    # What is not optimised here is machine code, which nobody runs; the program that is read stays the same.
    flags = f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    child = subprocess.run(
        [sys.executable, "-m", "dip_jax.planning.plan"], input=request, env=environment, capture_output=True, text=True
    )
    if child.returncode == Exit.USER_ERROR:
        raise UserError(child.stderr.strip().splitlines()[-1])
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise UserError(f"compiling for {count} devices ended with code {child.returncode} ({last}): is there enough memory?")
    values = json.loads(child.stdout.splitlines()[-1])
    found = tuple(
        hlo.Collective(**one | {name: tuple(one[name]) for name in ("group", "arrays")}) for one in values.pop("collectives")
    )
    return Plan(**values, collectives=found)


def lower_step(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The jitted training step of `config` on abstract arrays that lie where training puts them.

    Raises:
        UserError: if the mesh does not fit the config.
    """
    sharding.check_split(mesh.shape, model=config.model, batch_size=config.data.batch_size, accumulate=config.optim.accumulate)
    model = dip.from_config(config.model)
    optimizer = optim.make_optimizer(config.optim, total_steps=config.train.steps)
    aligned = {"alignment": repa.align(config.repa, config.model)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    with sharding.use_rules(config.mesh.rules):
        shardings = state.state_shardings(
            model, optimizer, mesh, zero1=config.mesh.zero1, averages=len(config.optim.ema_decays), **aligned
        )
        arrays = state.abstract_state(model, optimizer, shardings, **aligned)
        frozen = [repa.abstract_teacher(aligned["alignment"], mesh)] if aligned["alignment"] else []
        place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch",)))
        count, (h, w) = config.data.batch_size, config.model.image_size
        batch = {
            "image": jax.ShapeDtypeStruct((count, h, w, 3), jnp.uint8, sharding=place),
            "label": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=place),
        }
        with jax.set_mesh(mesh):
            run = step.compile_train_step(
                model,
                optimizer,
                state.formats(arrays),
                mesh,
                objective=config.flow,
                optim=config.optim,
                frozen=jax.tree.map(lambda a: a.sharding, frozen[0]) if frozen else None,
                **aligned,
            )
            return run.lower(arrays, batch, key, *frozen)


def read_plan(compiled: jax.stages.Compiled) -> Plan:
    """What a compiled step needs."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Plan(
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=hlo.flops(text),
        collectives=tuple(hlo.collectives(text)),
    )


def _main() -> int:
    config = from_dict(json.loads(sys.stdin.read()))
    try:
        with target.everywhere():
            lowered = lower_step(config, sharding.make_mesh(config.mesh))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return Exit.USER_ERROR
    print(json.dumps(dataclasses.asdict(read_plan(lowered.compile()))))
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(_main())
