"""The folded U-Net equals its plain definition: pad, convolve, pool, upsample, concatenate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_unet import plain_unet
from small_models import assert_same, randomise, small

from dip_jax import config
from dip_jax.models import folding
from dip_jax.models.detailers import UNet
from dip_jax.runtime import target


@pytest.mark.parametrize(
    ("patch_size", "depth", "pool", "upsample", "feature", "composed"),
    [
        (16, 4, "max", "transposed", "silu", True),
        (16, 4, "max", "transposed", "silu", False),
        (16, 4, "avg", "nearest", "raw", True),
        (16, 2, "max", "transposed", "raw", True),
        (16, 1, "avg", "transposed", "silu", True),
        (8, 3, "max", "nearest", "silu", True),
        pytest.param(32, 4, "max", "transposed", "silu", True, marks=pytest.mark.slow),
        pytest.param(32, 4, "max", "transposed", "silu", False, marks=pytest.mark.slow),
        pytest.param(32, 4, "avg", "nearest", "raw", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_folded_unet_is_the_plain_one(platform, patch_size, depth, pool, upsample, feature, composed, monkeypatch):
    monkeypatch.setattr(target, "platform", lambda: platform)
    monkeypatch.setattr(folding, "composes", lambda *sizes, patches: composed)
    fields = {"head_pool": pool, "head_upsample": upsample, "head_feature": feature, "head_depth": depth, "head_width": 6}
    model = config.Model(
        size="tiny",
        width=24,
        num_heads=2,
        patch_size=patch_size,
        image_size=(patch_size, patch_size),
        dtype="float32",
        **fields,
    )
    p = jax.random.normal(jax.random.key(0), (patch_size, patch_size, 3))
    s, t_emb = jax.random.normal(jax.random.key(1), (2, 24))
    weights = jax.random.normal(jax.random.key(2), p.shape)
    params = randomise(nn.meta.unbox(jax.jit(UNet(model).init)(jax.random.key(3), p, s, t_emb)["params"]))

    def folded(params, p, s):
        return UNet(model).apply({"params": params}, p, s, t_emb)

    def plain(params, p, s):
        return plain_unet(params, p, s, t_emb, depth=depth, pooling=pool, feature=feature)

    def both(f):
        def value(*operands):
            output = f(*operands)
            return jnp.sum(weights * output), output

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(params, p, s)

    assert_same(both(folded), both(plain), 5e-6)


def test_kernels_are_composed_where_that_saves_products():
    """Counted anew: 36 C^2 O (16 where one input meets four outputs) to compose, against what the plain order costs more."""
    for side, c, o in ((1, 512, 256), (2, 256, 128), (4, 128, 64), (8, 64, 64)):
        dense = side == 1
        saved = side**2 * (4 * c * c + (16 - 4 if dense else 36 - 16) * c * o)
        threshold = (16 if dense else 36) * c * c * o / saved
        assert not folding.composes(side, c, o, patches=int(threshold))
        assert folding.composes(side, c, o, patches=int(threshold) + 1)


def test_a_head_knows_how_many_patches_it_is_mapped_over(monkeypatch):
    seen = []
    monkeypatch.setattr(folding, "composes", lambda *sizes, patches: seen.append(patches) or True)
    model = small(head="unet")
    params = jax.eval_shape(model.init, jax.random.key(0))
    seen.clear()
    x = jax.ShapeDtypeStruct((6, 16, 8, 3), jnp.float32)
    jax.eval_shape(model.apply, params, x, jax.ShapeDtypeStruct((6,), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.int32))
    assert set(seen) == {6 * 2}
    assert folding.patches_at_once() == 1


@pytest.mark.parametrize("side", [2, 4])
def test_of_equals_the_first_has_the_gradient_of_the_maximum(side):
    """As PyTorch's max pooling, row by row; a window of one colour is where it matters."""
    x = jnp.ones((side, side, 1)).at[0, 1, 0].set(2.0).at[1, 0, 0].set(2.0)
    found = jax.grad(lambda x: jnp.sum(folding.POOLS["max"](x)))(x)[..., 0]
    expected = jnp.zeros((side, side)).at[::2, ::2].set(1.0).at[0, 0].set(0.0).at[0, 1].set(1.0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("place", range(4))
def test_a_window_with_a_nan_is_nan(place):
    """As PyTorch's: what is no number must reach the loss, or nobody would stop the training."""
    x = jnp.arange(4.0).at[place].set(jnp.nan).reshape(2, 2, 1)
    assert np.isnan(folding.POOLS["max"](x)).all()


@pytest.mark.parametrize("composed", [True, False])
def test_cast_parameters_give_the_same_bits_in_either_order(composed, monkeypatch):
    monkeypatch.setattr(folding, "composes", lambda *sizes, patches: composed)
    model = small(head="unet", dtype="bfloat16")
    params = randomise(jax.jit(model.init)(jax.random.key(1)))
    batch = jax.random.normal(jax.random.key(2), (2, 16, 8, 3)), jnp.array([0.1, 0.9]), jnp.array([0, 1])
    apply = jax.jit(lambda *operands: model.apply(*operands))  # its own trace: `composes` is no key of a cache
    np.testing.assert_array_equal(apply(model.cast(params), *batch), apply(params, *batch))
