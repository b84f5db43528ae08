"""The real programs through the accelerators' own compilers: `pytest --aot tests/planning/test_ahead.py`.

What a CPU's compiler cannot show is checked here: what is gathered, what is hidden behind products, in which type products run,
what is updated in place, how much memory is left. Small in depth and width; the programs are otherwise those of DiP-XL.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile

import jax
import pytest
from small_models import COMBINATIONS

from dip_jax import config
from dip_jax.jobs import info
from dip_jax.planning import ahead, hlo, topologies
from dip_jax.training import optim, state

LAYERS = 5  # no other size is 5
TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e '.[aot-tpu]'")
GPU = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs pip install -e '.[aot-gpu]'")
pytestmark = [pytest.mark.aot]

BASE = config.Model(
    size="tiny",
    depth=LAYERS,
    width=256,
    num_heads=4,
    patch_size=16,
    image_size=(64, 64),
    num_classes=10,
    head="none",
)
MESHES = {
    "one": config.Mesh(data=1),
    "data": config.Mesh(data=-1),
    "fsdp": config.Mesh(data=1, fsdp=-1),
    "zero1": config.Mesh(data=-1, zero1=True),
    "tensor": config.Mesh(data=-1, tensor=2),
    "mixed": config.Mesh(data=-1, fsdp=2, tensor=2),
}
ASYNC = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
MACHINES = ["v5e-8", "v5p-8", "v6e-4"]


@functools.cache
def compiled(machine: str, mesh: str = "data", job: str = "train", sample: config.Sample | None = None, **changed):
    """(what was read, the optimised program, the config)."""
    model = dataclasses.replace(BASE, **changed)
    topology = topologies.parse(machine)
    sizes = info.fill(MESHES[mesh], devices=topology.devices)
    whole = config.Config(model=model, data=config.Data(batch_size=64), mesh=sizes, sample=sample or config.Sample())
    with tempfile.NamedTemporaryFile("r", suffix=".hlo") as file:
        found = ahead.compile_ahead(whole, topology=topology, job=job, machine_code=False, keep_text=file.name)
        return found, pathlib.Path(file.name).read_text(), whole


def check_train(machine: str, mesh: str, **changed) -> ahead.Compiled:
    """All that holds for every training step."""
    found, text, whole = compiled(machine, mesh, **changed)
    model = state_of(whole)
    leaves = len(jax.tree.leaves(model))
    assert len(re.findall(r"\{\d+\}: \(\d+, \{\}, (?:may|must)-alias\)", text.split("\n", 1)[0])) == leaves
    assert found.needed_bytes == 0 and found.total_bytes < topologies.parse(machine).memory
    # The gradient of the label table goes where its rows are; activations never do.
    assert not [one for one in found.collectives if one.kind == "all-to-all" and "/label" not in one.source], "resharded"
    stacks = [shape for one in found.collectives if one.kind == "all-gather" for shape in one.arrays if one.count > 1]
    assert not [shape for shape in stacks if f"[{LAYERS}," in shape], "the stack of all layers gathered in a loop"
    assert products(text, "f32") == [], "block products that run in float32"
    assert len(products(text, "bf16")) >= 12  # 4 linear maps, their gradients
    return found


def state_of(whole: config.Config):
    model = ahead.dip.from_config(whole.model)
    optimizer = optim.make_optimizer(whole.optim, total_steps=whole.train.steps)
    return jax.eval_shape(functools.partial(state.create_state, model, optimizer), jax.random.key(0))


def products(text: str, kind: str) -> list[str]:
    """The operations of the blocks whose product reads only arrays of this type."""
    _, found = hlo.computations(text)
    seen = []
    for body in found.values():
        results = {one.name: one.result for one in body}
        for one in body:
            named = hlo.source_of(one)
            if one.opcode in ("dot", "convolution") and "/blocks" in named:
                types = {results.get(name, "").split("[")[0] for name in one.operands[:2]}
                seen += [named] if types == {kind} else []
    return seen


@TPU
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("mesh", ["data", "fsdp", "zero1", "tensor", "mixed"])
def test_every_mesh(machine, mesh):
    found = check_train(machine, mesh)
    gathered = [one for one in found.collectives if one.kind == "all-gather" and one.count == LAYERS]
    params = sum(leaf.size for leaf in jax.tree.leaves(state_of(compiled(machine, mesh)[2]).params))
    if mesh == "fsdp":
        weights = [one for one in gathered if one.size > 2**16]
        assert len(weights) >= 6
        if machine == "v5e-8":  # the other two do so only where they are told: see the next test
            assert all(one.channel in found.hidden for one in weights), "a gather that is not hidden"
    if mesh == "data":
        assert not [one for one in found.collectives if one.kind == "all-gather" and one.size > 2**16]
        assert sum(one.size * one.count for one in found.collectives) < 1.2 * 4 * params
    if mesh in ("fsdp", "zero1"):
        assert found.state_bytes < 0.75 * compiled(machine, "data")[0].state_bytes


@TPU
def test_gathers_hide_behind_products_where_the_compiler_is_told(monkeypatch):
    """By the flags that docs/scaling.md names; without them a v6e stops at every gather."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", ASYNC)
    compiled.cache_clear()
    found = compiled("v6e-4", "fsdp")[0]
    compiled.cache_clear()
    weights = [one for one in found.collectives if one.kind == "all-gather" and one.count == LAYERS and one.size > 2**16]
    hidden = [one.size for one in weights if one.channel in found.hidden]
    assert sum(hidden) > 0.5 * sum(one.size for one in weights)


@TPU
@pytest.mark.parametrize("machine", ["v5e-1", "v6e-1"])
def test_one_device_talks_to_nobody(machine):
    assert check_train(machine, "one").collectives == ()


@TPU
@pytest.mark.parametrize(("head", "placement"), COMBINATIONS)
def test_every_head_and_placement(head, placement):
    number = COMBINATIONS.index((head, placement))
    machine, mesh = MACHINES[number % 3], ["data", "fsdp", "zero1", "mixed"][number % 4]
    check_train(machine, mesh, head=head, placement=placement, head_width=64, head_depth=2, inject_after=2)


@TPU
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_rematerialisation(remat, scan):
    found = check_train("v5e-8", "data", remat=remat, scan_layers=scan)
    again = {"none": 0, "dots": 1, "full": 2}
    if remat != "none":
        less = ["none", "dots", "full"][again[remat] - 1]
        assert found.temporary_bytes < 1.02 * compiled("v5e-8", "data", remat=less, scan_layers=scan)[0].temporary_bytes


@TPU
@pytest.mark.parametrize("machine", MACHINES)
def test_memory_is_near_the_estimate(machine):
    """Between half and 2.2 times what `info` estimates from shapes; so small a program is partly in the chip's own memory."""
    found, _, whole = compiled(machine, "zero1", head="unet", head_width=64, head_depth=2)
    estimate = info.describe(whole, mesh=whole.mesh)["bytes_per_device"]["total"]
    assert 0.5 * estimate < found.total_bytes < 2.2 * estimate


@TPU
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "sde"])
@pytest.mark.parametrize("batch", [1, 64])
def test_sampling(solver, batch):
    sample = config.Sample(solver=solver, steps=20, batch_size=batch)
    machine = MACHINES[len(solver) % 3]
    found, text, _ = compiled(machine, job="sample", sample=sample)
    pixels = max(batch, *found.mesh.values()) * math.prod(BASE.image_size) * 3  # uint8
    assert [one for one in found.collectives if one.size > pixels] == [], "more than the finished images travels"
    assert products(text, "f32") == [] and len(products(text, "bf16")) >= 4
    assert found.total_bytes < topologies.parse(machine).memory


@TPU
def test_what_does_not_fit_is_one_verdict():
    whole = config.Config(data=config.Data(batch_size=256), mesh=config.Mesh(data=8))  # DiP-XL/16
    topology = topologies.parse("v5e-8")
    found = ahead.compile_ahead(whole, topology=topology, machine_code=False)
    assert found.needed_bytes > topology.memory and found.collectives == ()


@TPU
def test_two_at_once_leave_nothing_behind(tmp_path):
    before = set(os.listdir("/tmp"))
    whole = config.Config(model=BASE, data=config.Data(batch_size=64), mesh=config.Mesh(data=4))
    run = functools.partial(ahead.compile_ahead, whole, topology=topologies.parse("v6e-4"), machine_code=False)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = [future.result() for future in [pool.submit(run), pool.submit(run)]]
    assert first.total_bytes == second.total_bytes
    left = {name for name in set(os.listdir("/tmp")) - before if "tpu" in name.lower()}
    assert left == set() and "libtpu_lockfile" not in os.listdir("/tmp")


@GPU
@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_a_gpus_step(mesh):
    found, text, whole = compiled("h100x4", mesh, head="unet", head_width=64, head_depth=2)
    assert found.kernels["__cudnn$fmhaSoftmax"] >= 1 and found.kernels["__cudnn$fmhaSoftmaxBackward"] == 1
    assert found.aliased and products(text, "f32") == []
    assert not [one for one in found.collectives if one.kind == "all-to-all" and "/label" not in one.source]


@GPU
def test_a_gpus_sampling_call():
    found, _, _ = compiled("h200x8", job="sample", sample=config.Sample(steps=20))
    assert found.kernels["__cudnn$fmhaSoftmax"] >= 1 and "__cudnn$fmhaSoftmaxBackward" not in found.kernels
