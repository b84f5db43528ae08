"""The folded U-Net equals its plain definition: pad, convolve, pool, upsample, concatenate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from test_models import assert_same, randomise

from dip_jax import config
from dip_jax.models.detailers import UNet

REDUCE = {"avg": jnp.mean, "max": jnp.max}


def conv(x, parameters):
    kernel = parameters["kernel"]
    kernel = kernel if kernel.ndim == 4 else kernel[None, None]
    y = lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]
    return y + parameters["bias"][None, None]


def plain_unet(params, p, s, t_emb, *, depth, pool, upsample, feature):
    """The paper's network, literally."""
    s = jax.nn.silu(t_emb + s) if feature == "silu" else s
    x, skips = p, []
    for i in range(depth):
        x = jax.nn.silu(conv(x, params[f"down_{i}"]))
        skips.append(x)
        half = x.shape[0] // 2
        x = REDUCE[pool](x.reshape(half, 2, half, 2, -1), axis=(1, 3))
    expanded = jnp.broadcast_to(s[None, None], (*x.shape[:2], s.size))
    x = jax.nn.silu(conv(jnp.concatenate([x, expanded], -1), params["bottleneck"]))
    for i in reversed(range(depth)):
        x = jax.image.resize(x, (2 * x.shape[0], 2 * x.shape[1], x.shape[2]), upsample)
        x = jax.nn.silu(conv(jnp.concatenate([x, skips[i]], -1), params[f"up_{i}"]))
    return conv(x, params["out"])


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
