"""The authors' U-Net, literally, for one patch: what the folded one is tested and timed against."""

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, parameters):
    """A convolution with zero padding, x [r, r, I] -> [r, r, O]."""
    kernel = parameters["kernel"].astype(x.dtype)
    kernel = kernel if kernel.ndim == 4 else kernel[None, None]
    y = lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)[0]
    return y + parameters["bias"].astype(x.dtype)[None, None]


def pool(x, kind):
    """2x2 windows, stride 2."""
    if kind == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
    return lax.reduce_window(x, 0.0, lax.add, (2, 2, 1), (2, 2, 1), "VALID") / 4


def upsample(x, parameters):
    """A transposed convolution 2x2 of stride 2, or nearest neighbours where there are no parameters."""
    if parameters is None:
        return jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1)
    kernel = parameters["kernel"].astype(x.dtype)
    y = lax.conv_transpose(x[None], kernel[::-1, ::-1], (2, 2), "VALID", dimension_numbers=_LAYOUT, transpose_kernel=False)[0]
    return y + parameters["bias"].astype(x.dtype)[None, None]


def plain_unet(params, p, s, t_emb, *, depth, pooling="max", feature="silu"):
    """Pad, convolve, pool, upsample, concatenate: p [P, P, 3], s [D], t_emb [D] -> [P, P, 3]."""
    s = jax.nn.silu(t_emb + s) if feature == "silu" else s
    x, skips = p, []
    for i in range(depth):
        x = jax.nn.silu(conv(x, params[f"down_{i}"]))
        skips.append(x)
        x = pool(x, pooling)
    expanded = jnp.broadcast_to(s[None, None], (*x.shape[:2], s.size))
    x = jax.nn.silu(conv(jnp.concatenate([x, expanded], -1), params["bottleneck"]))
    for i in reversed(range(depth)):
        x = upsample(x, params.get(f"upsample_{i}"))
        x = jax.nn.silu(conv(jnp.concatenate([x, skips[i]], -1), params[f"up_{i}"]))
    return conv(x, params["out"])
