"""The paper's U-Net, literally, for one patch: what the folded one is tested and timed against."""

import jax
import jax.numpy as jnp
from jax import lax

REDUCE = {"avg": jnp.mean, "max": jnp.max}


def conv(x, parameters):
    """A convolution with zero padding, x [r, r, I] -> [r, r, O]."""
    kernel = parameters["kernel"].astype(x.dtype)
    kernel = kernel if kernel.ndim == 4 else kernel[None, None]
    y = lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]
    return y + parameters["bias"].astype(x.dtype)[None, None]


def plain_unet(params, p, s, t_emb, *, depth, pool="avg", upsample="nearest", feature="raw"):
    """Pad, convolve, pool, upsample, concatenate: p [P, P, 3], s [D], t_emb [D] -> [P, P, 3]."""
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
