"""The teacher equals the published DINOv2 as `benchmarks/parity_dinov2.py` ran it, on one device and on eight."""

import functools

import dinov2_cases
import jax
import numpy as np
import pytest
from dinov2_cases import BASE, TINY
from traced import products

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import cost, dinov2
from dip_jax.runtime import sharding

SMALLEST = dinov2.DinoV2(width=64, depth=1, table_side=2)


@functools.cache
def network(encoder: dinov2.DinoV2):
    return dinov2.from_torch(dinov2_cases.random_tensors(encoder))[1]


def tokens_of(case: dinov2_cases.Case, dtype: str = "float32") -> np.ndarray:
    apply = functools.partial(dinov2.patch_tokens, case.encoder, grid=case.grid, dtype=dtype)
    return jax.jit(apply)(network(case.encoder), dinov2_cases.images(case))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.encoder == BASE else ()) for case in dinov2_cases.CASES],
)
def test_tokens_equal_those_of_the_published_network(case):
    with np.load(dinov2_cases.ANSWERS) as golden:
        expected, scale = golden[case.name], golden[f"{case.name}/scale"]
    tokens = tokens_of(case)
    assert tokens.shape == (2, case.grid[0] * case.grid[1], case.encoder.width)
    np.testing.assert_allclose(dinov2_cases.thin(tokens), expected, atol=1e-5 * scale, rtol=0)


def test_bfloat16_stays_close_to_float32():
    case = dinov2_cases.CASES[0]
    exact, rough = tokens_of(case), tokens_of(case, "bfloat16")
    assert rough.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.02


def test_eight_devices_compute_what_one_does():
    params, images = network(TINY), np.random.RandomState(0).uniform(-1, 1, (8, 32, 48, 3)).astype(np.float32)
    apply = jax.jit(functools.partial(dinov2.patch_tokens, TINY, grid=(2, 3), dtype="float32"))
    alone = np.asarray(apply(params, images))
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(mesh, dinov2.logical_axes(), params))
        split = jax.device_put(images, jax.NamedSharding(mesh, sharding.spec(("batch", None, None, None))))
        together = apply(placed, split)
    assert placed["blocks"]["up"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    np.testing.assert_allclose(together, alone, atol=2e-5, rtol=0)


def test_every_parameter_has_its_logical_axes():
    def fits(axes, array):
        assert len(axes) == array.ndim
        sharding.spec(axes)

    jax.tree.map(fits, dinov2.logical_axes(), network(SMALLEST), is_leaf=sharding.is_axes)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"), [(384, 12, 6, 22.1), (768, 12, 12, 86.6), (1024, 24, 16, 304.4)]
)
def test_sizes_are_read_from_the_tensors(width, depth, heads, millions):
    encoder = dinov2.DinoV2(width, depth)
    shapes = dinov2.tensor_shapes(encoder)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert dinov2.config_of(tensors) == encoder and encoder.num_heads == heads


def zeros(encoder: dinov2.DinoV2 = SMALLEST, **changed: tuple[int, ...] | None) -> dict[str, np.ndarray]:
    """The tensors of a network, some of another shape, or absent; __ stands for a dot."""
    shapes = dinov2.tensor_shapes(encoder) | {name.replace("__", "."): shape for name, shape in changed.items()}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (zeros(norm__bias=None), "^1 tensors do not fit DINOv2 of width 64: norm.bias: missing$"),
        (zeros(mask_token=(64,)), r"mask_token: \[64\] instead of \[1, 64\]"),
        (zeros(head__weight=(10, 64)), "head.weight: extra"),
        (zeros(patch_embed__proj__weight=(64, 3, 16, 16)), r"\[64, 3, 16, 16\] instead of \[64, 3, 14, 14\]"),
        (zeros(blocks__2__ls1__gamma=(64,)), "15 tensors .* blocks.1.attn.qkv.bias: missing.*; and 7 more"),
        (zeros(register_tokens=(1, 4, 64)), "register tokens; the teacher is the one without: dinov2_vit{s,b,l}14"),
        (zeros(blocks__0__mlp__w12__weight=(8, 8)), "size g"),
        (zeros(pos_embed=(1, 6, 64)), r"pos_embed \[1, 6, 64\]: .* a class token before a square of positions"),
        (zeros(cls_token=(1, 1, 65)), r"cls_token \[1, 1, 65\]"),
        (zeros(cls_token=None), "no DINOv2 as the hub has it"),
        ({"embeddings.cls_token": np.zeros((1, 1, 64), np.float32)}, r"no DINOv2 .* 1 tensors \(embeddings.cls_token"),
    ],
)
def test_other_networks_are_refused_in_one_line(tensors, message):
    with pytest.raises(UserError, match=message) as error:
        dinov2.from_torch(tensors)
    assert "\n" not in str(error.value)


def test_flops_are_those_of_the_traced_products():
    params = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), network(TINY))

    def traced(batch: int) -> int:
        images = jax.ShapeDtypeStruct((batch, 64, 128, 3), np.float32)
        apply = functools.partial(dinov2.patch_tokens, TINY, grid=(2, 4))
        return products(jax.make_jaxpr(apply)(params, images).jaxpr)

    assert cost.teacher_flops(TINY, image_size=(64, 128), grid=(2, 4)) == traced(3) - traced(2)
    assert cost.teacher_flops(BASE, image_size=(256, 256), grid=(16, 16)) == pytest.approx(46.5e9, rel=0.001)
