"""The folded U-Net equals its plain definition: pad, convolve, pool, upsample, concatenate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from plain_unet import plain_unet
from small_models import assert_same, randomise

from dip_jax import config
from dip_jax.models.detailers import UNet


@pytest.mark.parametrize(
    ("patch_size", "depth", "pool", "upsample", "feature"),
    [
        (16, 4, "avg", "nearest", "raw"),
        (16, 4, "max", "bilinear", "silu"),
        (16, 1, "avg", "nearest", "silu"),
        (16, 2, "max", "nearest", "raw"),
        (16, 3, "avg", "bilinear", "raw"),
        (8, 3, "avg", "nearest", "raw"),
        pytest.param(32, 4, "avg", "nearest", "raw", marks=pytest.mark.slow),
        pytest.param(32, 4, "max", "bilinear", "silu", marks=pytest.mark.slow),
    ],
)
def test_folded_unet_is_the_plain_one(patch_size, depth, pool, upsample, feature):
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
        return plain_unet(params, p, s, t_emb, depth=depth, pool=pool, upsample=upsample, feature=feature)

    def both(f):
        def value(*operands):
            output = f(*operands)
            return jnp.sum(weights * output), output

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(params, p, s)

    assert_same(both(folded), both(plain), 5e-6)
