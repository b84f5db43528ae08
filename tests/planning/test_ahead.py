"""What one machine's own compiler does with the real programs: `pytest --aot tests/planning/test_ahead.py`.

What a CPU's compiler cannot show: what is hidden behind products, how much memory is left. The checks that every
program passes are in tests/support/aot_programs.py, their rows in test_ahead_programs.py.
"""

import concurrent.futures
import functools
import os

import aot_programs as programs
import jax
import pytest
from aot_programs import GPU, LAYERS, TPU

from dip_jax import config
from dip_jax.jobs import info
from dip_jax.planning import ahead, hlo, topologies

pytestmark = [pytest.mark.aot]
ASYNC = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
# Large enough that what lies in a chip's own memory is little beside the rest: 256 tokens, 12 images of a device.
LARGE = {"width": 512, "num_heads": 8, "image_size": (256, 256), "head": "unet", "head_width": None, "head_depth": None}


def gathers(machine: str) -> tuple[list[hlo.Collective], list[hlo.Collective]]:
    """What fsdp gathers of weights in the loops, and those of these that products run beside."""
    few = programs.changed(model={"image_size": (64, 64)}, data={"batch_size": 64})  # more tokens are sent in pieces instead
    found = programs.compiled(machine, "fsdp", whole=few)[0]
    inside = [one for one in found.collectives if one.kind == "all-gather" and one.count == LAYERS and one.size > 2**16]
    return inside, [one for one in inside if one.channel in found.hidden]


def size(found: list[hlo.Collective]) -> int:
    return sum(one.size for one in found)


@TPU
def test_a_v5e_hides_all_gathers_of_fsdp_but_one():
    """Gate and up are gathered apart, as they are multiplied; nothing runs beside the second of them, forward."""
    inside, hidden = gathers("v5e-8")
    late = [one.source for one in inside if one not in hidden]
    assert len(late) == 1 and late[0].endswith("/mlp/gate_up/dot_general") and "transpose(" not in late[0]
    assert len(hidden) == len(inside) - 1


@TPU
def test_gathers_hide_behind_products_where_the_compiler_is_told(monkeypatch):
    """By the flags that docs/scaling.md names; without them a v6e stops at every gather."""
    told_nothing = gathers("v6e-4")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", ASYNC)
    programs.compiled.cache_clear()
    inside, hidden = gathers("v6e-4")
    programs.compiled.cache_clear()
    assert size(hidden) > 0.5 * size(inside) and size(told_nothing[0]) == size(inside)
    assert told_nothing[1] == [], "this libtpu hides without being told: docs/scaling.md may drop the flags"


@GPU
def test_a_gpu_sums_gradients_beside_products():
    """Of XL's width: of a model 256 wide a seventh of the bytes is hidden."""
    found = programs.check_train("h100x4", "data", programs.changed(model={"head": "unet", "width": 1152, "num_heads": 16}))
    sums = [one for one in found.collectives if one.kind == "all-reduce"]
    hidden = sum(one.size * one.count for one in sums if one.channel in found.hidden)
    assert hidden > 0.9 * sum(one.size * one.count for one in sums)


@GPU
def test_a_product_without_a_tiling_is_cublas():
    """67 tokens: XLA tiles products of its own, the one after its own attention among these, in rows of 16."""
    whole = programs.changed(model={"context_tokens": 3}, data={"batch_size": 40})
    found = programs.compiled("h100x1", "one", whole=whole)[0]
    assert "dot_general" in found.untiled and any("cublas" in name for name in found.kernels)


@TPU
def test_gradients_travel_once_and_state_is_split():
    params = sum(leaf.size for leaf in jax.tree.leaves(programs.state_of(programs.WHOLE).params))
    found = {mesh: programs.check_train("v5e-4", mesh) for mesh in ("data", "zero1", "fsdp")}
    assert sum(one.size * one.count for one in found["data"].collectives) < 1.2 * 4 * params
    assert found["zero1"].state_bytes < 0.5 * found["data"].state_bytes
    assert found["fsdp"].state_bytes < 0.35 * found["data"].state_bytes


@TPU
@pytest.mark.parametrize("machine", ["v5e-4", "v6e-4"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_memory_is_what_is_planned(machine, remat):
    """Within 15 %."""
    whole = programs.changed(model=LARGE | {"remat": remat}, data={"batch_size": 48})
    found, _, whole = programs.compiled(machine, "data", whole=whole)
    estimate = info.describe(whole, mesh=whole.mesh)["bytes_per_device"]["total"]
    assert found.total_bytes == pytest.approx(estimate, rel=0.15)


@TPU
def test_what_does_not_fit_is_one_verdict():
    whole = config.Config(data=config.Data(batch_size=256), mesh=config.Mesh(data=8))  # DiP-XL/16
    topology = topologies.parse("v5e-8")
    found = ahead.compile_ahead(whole, topology=topology, machine_code=False)
    assert found.needed_bytes > topology.memory and found.collectives == ()


@TPU
def test_two_at_once_leave_nothing_behind():
    before = set(os.listdir("/tmp"))
    whole = programs.changed(mesh={"data": 4})
    run = functools.partial(ahead.compile_ahead, whole, topology=topologies.parse("v6e-4"), machine_code=False)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = [future.result() for future in [pool.submit(run), pool.submit(run)]]
    assert first.total_bytes == second.total_bytes
    left = {name for name in set(os.listdir("/tmp")) - before if "tpu" in name.lower()}
    assert left == set() and "libtpu_lockfile" not in os.listdir("/tmp")
