"""Plans: what is read from a compiled program is what a hand count gives, on programs small enough to count."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import small

from dip_jax import __main__, config
from dip_jax.errors import UserError
from dip_jax.models import cost
from dip_jax.planning import hlo, plan, prediction
from dip_jax.runtime import accelerators, sharding

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def compiled_text(*, trips: int = 5) -> str:
    """A loop of products whose weights lie on fsdp, whose activations on data, with a reduction over tensor at the end."""
    mesh = sharding.make_mesh(config.Mesh(**MESH))

    def run(x, w):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, P(None, None))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("data", None)), None

        x = jax.lax.scan(body, x, w)[0]
        x = jax.lax.with_sharding_constraint(x, P("data", "tensor"))
        return jnp.sum(x, axis=1)

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("data", None)))
    w = jax.ShapeDtypeStruct((trips, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    out = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        return jax.jit(run, out_shardings=out).lower(x, w).compile().as_text()


def test_a_collective_inside_a_loop_counts_as_often_as_it_runs():
    found = hlo.collectives(compiled_text())
    gathers = [one for one in found if one.kind == "all-gather" and one.axes(MESH) == ("fsdp",)]
    assert sum(one.size * one.count for one in gathers) == 5 * 32 * 32 * 4
    assert all(one.sent == one.size * one.count / 2 for one in gathers)
    sums = [one for one in found if one.kind == "all-reduce" and one.axes(MESH) == ("tensor",)]
    assert [(one.size, one.count, one.sent) for one in sums] == [(8 * 4, 1, 32.0)]


def test_products_inside_a_loop_count_as_often_as_they_run():
    assert hlo.flops(compiled_text()) == 5 * 2 * 8 * 32 * 32
    assert hlo.flops(compiled_text(trips=7)) == 7 * 2 * 8 * 32 * 32


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, dimensions", (0, 4)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}, x", (0, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, x", (0, 2)),
        ("source_target_pairs={{0,0},{1,4},{4,1}}, x", (1, 4)),
        ("source_target_pairs={{0,0},{1,1}}, x", (0,)),
    ],
)
def test_every_way_to_write_a_group(text, group):
    assert hlo._group(text) == group


def test_the_plan_of_a_step_adds_up():
    """State by arithmetic on shapes, products by the cost model, gradients once through one all-reduce."""
    model = small(depth=3, width=32, dtype="float32", head="none").config
    whole = config.Config(model=model, data=config.Data(batch_size=16))
    found = plan.compile_plan(whole, mesh=config.Mesh(data=4))
    params = jax.eval_shape(plan.dip.from_config(model).init, jax.random.key(0))
    size = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    h, w = model.image_size
    assert found.state_bytes == pytest.approx(4 * size + 4 * h * w * 3 + 4 * 4, abs=64)
    forward = 4 * sum(cost.forward_flops(model).values())
    assert 2.5 * forward < found.flops < 3.2 * forward  # the first products have no gradient for their input
    reduced = [one for one in found.collectives if one.kind == "all-reduce"]
    assert sum(one.size * one.count for one in reduced) == pytest.approx(size, rel=0.1)
    assert found.temporary_bytes > size


def test_the_command_prints_a_plan(tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from dip_jax.config import defaults\n\ndef get_config():\n    c = defaults()\n"
        "    c.model.update(size='tiny', depth=1, width=16, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=3)\n"
        "    c.model.update(head='none', dtype='float32')\n    c.data.batch_size = 8\n    return c\n"
    )
    assert __main__.main(["info", f"--config={file}", "--mesh=data:2,fsdp:2", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("compiling the training step for --mesh=data:2,fsdp:2: seconds to minutes\n")
    facts = json.loads(said.out)
    compiled = facts["compiled"]
    assert compiled["bytes_per_device"]["total"] == sum(list(compiled["bytes_per_device"].values())[:2])
    assert set(compiled["predictions"]) == {"v5p", "v6e", "H100", "H200"}
    assert all(one["seconds"][0] <= one["seconds"][1] and one["fits"] for one in compiled["predictions"].values())
    assert {row["kind"] for row in compiled["collectives"]} <= set(hlo.COLLECTIVES)
    assert any(row["axes"] == "fsdp" and row["kind"] == "all-gather" for row in compiled["collectives"])
    table = plan_table(facts)
    assert "communication" in table and table.count("under 5 ") == len(compiled["predictions"]) + 1
    assert "0-0" not in table and "not predicted" in table.splitlines()[-1]
    for one in compiled["predictions"].values():
        one["seconds"], one["images_per_second"] = (0.2, 0.3), (40.0, 27.0)
    assert "200-300" in plan_table(facts) and "under" not in plan_table(facts)


def plan_table(facts: dict) -> str:
    from dip_jax.jobs import info

    return info.tables(facts)


def test_a_mesh_that_cannot_be_is_one_line():
    whole = config.Config(model=small().config, data=config.Data(batch_size=6))
    broken = dataclasses.replace(whole, mesh=config.Mesh())
    with pytest.raises(UserError, match="tensor"):
        plan.compile_plan(broken, mesh=config.Mesh(data=1, tensor=3))


def test_predictions():
    """A ring inside a node of eight is fast; one that leaves it is as fast as the adapters that it has."""
    h100 = accelerators.ACCELERATORS["H100"]
    assert h100.ring_rate(range(8)) == 450e9
    assert h100.ring_rate(range(0, 64, 8)) == 50e9
    assert h100.ring_rate(range(16)) == 400e9
    assert accelerators.ACCELERATORS["v5p"].ring_rate(range(0, 64, 8)) == 200e9
    reduce = hlo.Collective("all-reduce", int(1e9), tuple(range(8)), 3, "", ())
    assert reduce.sent == 3 * 2 * 7 / 8 * 1e9
    guess = prediction.predict(h100, flops=989 * 10**12, collectives=[reduce], state_bytes=0, total_bytes=81 * 10**9)
    assert guess.compute == pytest.approx(2.5) and not guess.fits
    assert guess.communication == pytest.approx(reduce.sent / (0.8 * 450e9))
    assert guess.best == pytest.approx(2.5) and guess.worst == pytest.approx(2.5 + guess.communication)
