"""Patch Detailer Heads (section 3.3), each a function of ONE patch: head(p, s, t_emb) -> [P, P, 3].

p [P, P, 3] are the noisy pixels, s [D] is the backbone's feature of the patch, t_emb [D] the time embedding (shared by all
patches, float32). `models/placement.py` maps a head over the patches. A new head is a class here and a row in `HEADS`.

A head may claim more than the contracts that hold for all: `starts_at_zero` (whether its first output is zero), and, as the
others must read p, that it does not (`reads_pixels = False`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dip_jax import config
from dip_jax.config.checks import one_of
from dip_jax.errors import UserError
from dip_jax.models import folding
from dip_jax.models.layers import RMSNorm, SwiGLU, attend
from dip_jax.models.linear import INITS, Linear, dot, named, normal, unstack
from dip_jax.models.rounding import add


class Conv(nn.Module):
    """The parameters of one convolution, as (kernel [*window, I, O], bias [O]); the head decides how to apply them."""

    window: tuple[int, ...]
    fan_in: int
    features: int
    init: str = "fan_in"

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        taps = int(np.prod(self.window, dtype=int))
        kernel_init, bias_init = INITS[self.init](taps * self.fan_in, self.features)
        axes = ("kernel",) * len(self.window) + ("head_in", "head_out")
        kernel = self.param("kernel", named(kernel_init, axes), (*self.window, self.fan_in, self.features))
        return kernel, self.param("bias", named(bias_init, ("head_out",)), (self.features,))


def unet_depth(model: config.Model) -> int:
    """Stages of the U-Net: `head_depth`, or as many as the patch allows, at most 4."""
    p = model.patch_size
    return model.head_depth or next(d for d in (4, 3, 2, 1, 0) if p % 2**d == 0)


class UNet(nn.Module):
    """The convolutional U-Net, the paper's choice: `head_depth` stages of width head_width * (1, 2, 4, 8).

    Down: conv 3x3, SiLU, 2x pool. Bottleneck: concat SiLU(t_emb + s), conv 1x1, SiLU. Up: transposed conv 2x2 of stride 2,
    concat the activation from before the pool of that resolution, conv 3x3, SiLU. Last: conv 1x1. Defaults: the authors' own.
    Parameters are those of this plain form; what runs is an exact rewrite of it (`models/folding.py`) in which nothing is
    concatenated or broadcast, and nothing upsampled where there is enough to do.
    """

    config: config.Model
    starts_at_zero = False

    @nn.compact
    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        depth, base = unet_depth(model), model.head_width or 64
        widths = [base * 2**i for i in range(depth)]
        pool = folding.POOLS[model.head_pool]
        if model.head_feature == "silu":
            s = nn.silu(t_emb.astype(jnp.float32) + s.astype(jnp.float32))

        x, skips = p.astype(dtype), []
        for i, width in enumerate(widths):
            kernel, bias = Conv((3, 3), x.shape[-1], width, init=model.head_init, name=f"down_{i}")()
            skips.append(nn.silu(add(folding.convolve(x, kernel), bias)))
            x = pool(skips[-1])

        kernel, bias = Conv((), widths[-1] + model.width, widths[-1], init=model.head_init, name="bottleneck")()
        of_pixels, of_feature = kernel[: widths[-1]], kernel[widths[-1] :]
        x = nn.silu(add(dot(x, of_pixels.astype(dtype)), add(dot(s.astype(dtype), of_feature.astype(dtype)), bias)))

        for i in reversed(range(depth)):
            kernel, bias = Conv((3, 3), 2 * widths[i], widths[max(i - 1, 0)], init=model.head_init, name=f"up_{i}")()
            of_below, of_skip = kernel[:, :, : widths[i]], kernel[:, :, widths[i] :]
            if model.head_upsample == "transposed":
                lift = Conv((2, 2), widths[i], widths[i], init=model.head_init, name=f"upsample_{i}")()
                below = folding.convolve_transposed(x, *lift, of_below)
            else:
                below = folding.convolve_upsampled(x, of_below)
            x = nn.silu(add(below + folding.convolve(skips[i], of_skip), bias))

        kernel, bias = Conv((), base, 3, init="zeros" if model.head_zero_init else "fan_in", name="out")()
        return add(dot(x, kernel.astype(x.dtype)), bias)


class MLP(nn.Module):
    """The standard MLP: [s; flatten(p)] -> `head_depth` (1) hidden layers of `head_width` (D + 3 P^2) with SiLU -> pixels."""

    config: config.Model
    starts_at_zero = True

    @nn.compact
    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        x = jnp.concatenate([s.astype(dtype), p.reshape(-1).astype(dtype)])
        width = model.head_width or x.size
        for i in range(model.head_depth or 1):
            x = nn.silu(Linear((width,), ("head_in", "head_out"), dtype=dtype, name=f"hidden_{i}")(x))
        return Linear((p.size,), ("head_in", "head_out"), init=_last(model), dtype=dtype, name="out")(x).reshape(p.shape)


def _last(model: config.Model) -> str:
    """How the last layer of the heads other than the U-Net starts: at zero unless told otherwise."""
    return "fan_in" if model.head_zero_init is False else "zeros"


def dct_basis(patch_size: int, frequencies: int = 8) -> np.ndarray:
    """cos(pi fx x) cos(pi fy y) / (1 + fx fy) on pixel coordinates in [0, 1]: [P^2, frequencies^2], fy fastest.

    The frequencies are linspace(0, 8, 8), not integers: the published weights were trained with these.
    """
    position = np.linspace(0, 1, patch_size)
    f = np.linspace(0, frequencies, frequencies)
    cosines = np.cos(np.pi * position[:, None] * f[None, :])
    basis = cosines[None, :, :, None] * cosines[:, None, None, :] / (1 + f[:, None] * f[None, :])
    return basis.reshape(patch_size**2, frequencies**2).astype(np.float32)


class CoordinateBlock(nn.Module):
    """x [P^2, W] + a two-layer MLP whose weights [W, 2W], [2W, W] are made from the condition and have unit columns."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        width = x.shape[-1]
        generated = Linear((2, 2 * width * width), ("embed", None, "head_out"), dtype=self.dtype, name="generator")(condition)
        first = _unit(generated[0].reshape(width, 2 * width)).astype(self.dtype)
        second = _unit(generated[1].reshape(2 * width, width)).astype(self.dtype)
        return x + nn.silu(RMSNorm(name="norm")(x).astype(self.dtype) @ first) @ second


def _unit(weights: jax.Array) -> jax.Array:
    """Columns (over the input axis) of length one, float32, safe where a column is zero."""
    weights = weights.astype(jnp.float32)
    return weights * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(weights), axis=0, keepdims=True), 1e-24))


class CoordinateMLP(nn.Module):
    """The coordinate MLP = PixNerd's decoder: `head_depth` (4) residual blocks of `head_width` (64) on [rgb, DCT basis]."""

    config: config.Model
    starts_at_zero = True

    @nn.compact
    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        width = model.head_width or 64
        condition = nn.silu(t_emb.astype(jnp.float32) + s.astype(jnp.float32)).astype(dtype)
        pixels = p.reshape(-1, 3).astype(dtype)
        x = jnp.concatenate([pixels, jnp.asarray(dct_basis(p.shape[0]), dtype)], axis=-1)
        x = Linear((width,), ("head_in", "head_out"), dtype=dtype, name="embed")(x)
        for i in range(model.head_depth or 4):
            x = CoordinateBlock(dtype, name=f"block_{i}")(x, condition)
        x = RMSNorm(name="norm")(x)
        return Linear((3,), ("head_in", "head_out"), init=_last(model), dtype=dtype, name="out")(x).reshape(p.shape)


CONTEXT = 64  # tokens that the attention head makes of a feature


class PixelAttention(nn.Module):
    """Attention of x [A, W] to `context` [M, W], RMSNorm on q and k per head; [A, W]."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        width, kind = x.shape[-1], {"dtype": self.dtype}
        q = Linear((width,), ("head_in", "head_out"), bias=False, name="q", **kind)(x)
        kv = Linear((2, width), ("head_in", None, "head_out"), bias=False, name="kv", **kind)(context)
        q, k, v = (part.reshape(len(part), self.num_heads, -1) for part in (q, *unstack(kv, -2)))
        q, k = RMSNorm(name="q_norm")(q).astype(self.dtype), RMSNorm(name="k_norm")(k).astype(self.dtype)
        y = attend(q, k, v, choice="xla", dtype=self.dtype)
        return Linear((width,), ("head_in", "head_out"), name="proj", **kind)(y.reshape(x.shape))


class PixelBlock(nn.Module):
    """x [P^2, W] + cross-attention to the context [M, W] + self-attention + SwiGLU, each after an RMSNorm."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        def normed(name: str) -> jax.Array:
            return RMSNorm(name=name)(x).astype(self.dtype)

        x = x + PixelAttention(self.num_heads, self.dtype, name="cross")(normed("norm_cross"), context)
        own = normed("norm_self")
        x = x + PixelAttention(self.num_heads, self.dtype, name="self")(own, own)
        return x + SwiGLU(dtype=self.dtype, name="mlp")(normed("norm_mlp"))


class IntraPatchAttention(nn.Module):
    """A small transformer on the P^2 pixels of the patch: `head_depth` (2) blocks of `head_width` (64).

    As the paper draws it (third version, Figure 13c): pixels with learnable positions, cross-attention to s, self-attention.
    Its widths are not printed, only 630M parameters in all. To one token attention would be a constant, so SiLU(t_emb + s) is
    mapped to CONTEXT tokens here, which is where the head's parameters are.
    """

    config: config.Model
    starts_at_zero = True

    @nn.compact
    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        width = model.head_width or 64
        condition = nn.silu(t_emb.astype(jnp.float32) + s.astype(jnp.float32)).astype(dtype)
        context = Linear((CONTEXT, width), ("embed", None, "head_out"), dtype=dtype, name="context")(condition)
        x = Linear((width,), ("head_in", "head_out"), dtype=dtype, name="embed")(p.reshape(-1, 3).astype(dtype))
        x = add(x, self.param("positions", named(normal(0.02), (None, "head_out")), x.shape))
        for i in range(model.head_depth or 2):
            x = PixelBlock(max(width // 64, 1), dtype, name=f"block_{i}")(x, context)
        x = RMSNorm(name="norm")(x)
        return Linear((3,), ("head_in", "head_out"), init=_last(model), dtype=dtype, name="out")(x).reshape(p.shape)


# "none" is the DiT-only baseline: the backbone's own final layer, no head.
HEADS: dict[str, type[nn.Module] | None] = {
    "unet": UNet,
    "mlp": MLP,
    "coord_mlp": CoordinateMLP,
    "attention": IntraPatchAttention,
    "none": None,
}


def check_head(model: config.Model) -> None:
    """Refuses a head that cannot be built.

    Raises:
        UserError: for a name that is not in HEADS, a U-Net deeper than the patch allows, or an attention head whose width its
            heads do not divide.
    """
    one_of("model.head", model.head, HEADS)
    if model.head == "unet":
        depth, p = unet_depth(model), model.patch_size
        if not 1 <= depth <= 8 or p % 2**depth:
            raise UserError(
                f"model.head_depth={depth} halves the patch {depth} times, but model.patch_size={p} is not a multiple of "
                f"{2 ** max(depth, 1)}: use fewer stages or another patch size"
            )
    width = model.head_width or 64
    if model.head == "attention" and width % max(width // 64, 1):
        raise UserError(f"model.head_width={width} does not fit model.head=attention: use a multiple of 64, or less")
