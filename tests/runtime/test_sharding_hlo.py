"""The compiled training step on eight devices: what is pinned, what is gathered, what is reduced, what memory it takes."""

import dataclasses
import functools
import math
import re

import jax
import pytest

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.planning import hlo, plan
from dip_jax.runtime import sharding

LAYERS, BATCH = 5, 16  # no other size is 5
MODEL = config.Model(
    size="tiny",
    depth=LAYERS,
    width=64,
    num_heads=4,
    patch_size=8,
    image_size=(16, 16),
    num_classes=6,
    head="none",
    dtype="float32",
)
DATA, FSDP, ZERO1 = config.Mesh(data=8), config.Mesh(data=1, fsdp=8), config.Mesh(data=8, zero1=True)
MIXED = config.Mesh(data=2, fsdp=2, tensor=2)


def lower(mesh: config.Mesh) -> jax.stages.Lowered:
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    whole = config.Config(model=MODEL, data=config.Data(batch_size=BATCH), mesh=mesh)
    return plan.lower_step(whole, sharding.make_mesh(mesh, devices))


@functools.cache
def compiled(mesh: config.Mesh) -> tuple[plan.Plan, str]:
    done = lower(mesh).compile()
    return plan.read_plan(done), done.as_text()


def bytes_of_parameters() -> dict[str, int]:
    params = jax.eval_shape(plan.dip.from_config(MODEL).init, jax.random.key(0))
    return {jax.tree_util.keystr(path): 4 * math.prod(a.shape) for path, a in jax.tree_util.tree_leaves_with_path(params)}


def total(mesh: config.Mesh, kind: str, *, inside: bool | None = None) -> int:
    """Bytes of all collectives of a kind per step; inside or outside of the loop over layers."""
    found = [one for one in compiled(mesh)[0].collectives if one.kind == kind]
    return sum(one.size * one.count for one in found if inside is None or inside == (one.count == LAYERS))


def test_activations_are_pinned_inside_and_outside_of_the_blocks():
    """Tokens [16, 4, 64] stay split over data and fsdp, heads and the MLP's inner width over tensor as well."""
    text = lower(MIXED).as_text()
    pinned = re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, \[(.*?)\]> : tensor<([\dx]+)xf32>", text)
    tokens = [axes for axes, shape in pinned if shape == "16x4x64"]
    assert tokens.count('{"data", "fsdp"}, {}, {}') >= 3  # embedding, block, output; their gradients
    inner = [(axes, shape) for axes, shape in pinned if '"tensor"' in axes]
    assert any(shape.startswith("16x4x") for _, shape in inner), pinned
    assert all(axes.startswith('{"data", "fsdp"}') for axes, shape in pinned if shape.startswith("16x"))


def test_fsdp_gathers_each_layer_when_it_needs_it():
    """Inside the scan: twice the weights of a block (the backward pass gathers again), never the stack of all layers."""
    blocks = sum(size for name, size in bytes_of_parameters().items() if "blocks" in name and "modulation" not in name)
    gathered = total(FSDP, "all-gather", inside=True)
    assert 1.9 * blocks < gathered < 2.3 * blocks
    stacks = [one for one in compiled(FSDP)[0].collectives if any(f"[{LAYERS}," in shape for shape in one.arrays)]
    assert stacks == []


def test_fsdp_reduces_gradients_inside_the_scan():
    """As reduce-scatter, or as all-reduce and slice, which is how XLA writes it for CPUs."""
    blocks = sum(size for name, size in bytes_of_parameters().items() if "blocks" in name)
    reduced = sum(
        one.size * one.count
        for one in compiled(FSDP)[0].collectives
        if one.kind in ("reduce-scatter", "all-reduce") and one.count == LAYERS and "transpose" in one.source
    )
    assert 0.6 * blocks < reduced < 1.2 * blocks


def test_replicated_data_parallel_gathers_no_parameters():
    assert total(DATA, "all-gather") < 1000  # labels of the batch at most
    assert total(DATA, "all-reduce") == pytest.approx(sum(bytes_of_parameters().values()), rel=0.1)


def test_zero1_gathers_each_parameter_exactly_once():
    """After the update, outside of the loop over layers."""
    split = list(bytes_of_parameters().values())
    assert total(ZERO1, "all-gather", inside=True) == 0
    gathered = [one for one in compiled(ZERO1)[0].collectives if one.kind == "all-gather" and not one.source]
    assert sum(one.size for one in gathered) <= sum(split)
    assert sum(one.size for one in gathered) > 0.95 * (sum(split) - bytes_of_parameters()["['condition']['label']['table']"])
    assert total(ZERO1, "all-reduce") + total(ZERO1, "reduce-scatter") < 1.1 * sum(split)
    assert compiled(ZERO1)[0].state_bytes < 0.4 * compiled(DATA)[0].state_bytes


def test_memory_per_device_shrinks_with_the_mesh():
    temporary = [compiled(dataclasses.replace(DATA, data=n))[0].temporary_bytes for n in (1, 2, 8)]
    gradients = sum(bytes_of_parameters().values())
    assert temporary[0] > temporary[1] > temporary[2]
    # Activations are divided by the devices, gradients are not.
    assert temporary[2] - gradients < 0.45 * (temporary[0] - gradients)
    assert compiled(FSDP)[0].temporary_bytes < 0.7 * temporary[2]
    assert compiled(FSDP)[0].state_bytes < 0.2 * compiled(DATA)[0].state_bytes


def test_a_misspelt_axis_ends_the_start():
    with pytest.raises(UserError, match=r"'emebd'.*did you mean 'embed'"):
        lower(dataclasses.replace(MIXED, rules=(("emebd", "fsdp"),)))


def test_hlo_of_the_step_has_no_unknown_collective():
    """A collective that `hlo` does not know would be missing from every plan."""
    names = set(re.findall(r" ([a-z\-]*(?:all|reduce-scatter|permute|broadcast|ragged)[a-z\-]*)\(", compiled(MIXED)[1]))
    wires = {name.removesuffix("-start").removesuffix("-done") for name in names}
    assert wires & {"all-to-all", "all-gather", "all-reduce"}
    assert wires <= {*hlo.COLLECTIVES, "broadcast", "call", "custom-call"}, wires
