"""Patch Detailer Heads (section 3.3), each a function of ONE patch: head(p, s, t_emb) -> [P, P, 3].

p [P, P, 3] are the noisy pixels, s [D] is the backbone's feature of the patch, t_emb [D] the time embedding (shared by all
patches, float32). `models/placement.py` maps a head over the patches. A new head is a class here and a row in `HEADS`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import folding
from dip_jax.models.layers import INITS, Block, Linear, RMSNorm, layer_norm, modulate, named


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

    Down: conv 3x3, SiLU, 2x pool. Bottleneck: concat s, conv 1x1, SiLU. Up: 2x upsample, concat the activation from before the
    pool of that resolution, conv 3x3, SiLU. Last: conv 1x1. Parameters are those of this plain network; what runs is an exact
    rewrite of it (`models/folding.py`) in which nothing is upsampled, concatenated or broadcast.
    """

    config: config.Model

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
            skips.append(nn.silu(folding.convolve(x, kernel) + _row(bias, x)))
            x = pool(skips[-1])

        kernel, bias = Conv((), widths[-1] + model.width, widths[-1], init=model.head_init, name="bottleneck")()
        of_pixels, of_feature = kernel[: widths[-1]], kernel[widths[-1] :]
        x = nn.silu(_product(x, of_pixels) + _row(_product(s.astype(dtype), of_feature) + bias.astype(dtype), x))

        for i in reversed(range(depth)):
            kernel, bias = Conv((3, 3), 2 * widths[i], widths[max(i - 1, 0)], init=model.head_init, name=f"up_{i}")()
            of_below, of_skip = kernel[:, :, : widths[i]], kernel[:, :, widths[i] :]
            below = folding.convolve_upsampled(x, of_below, method=model.head_upsample)
            x = nn.silu(below + folding.convolve(skips[i], of_skip) + _row(bias, x))

        kernel, bias = Conv((), base, 3, init=_last(model), name="out")()
        return _product(x, kernel) + _row(bias, x)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _row(bias: jax.Array, like: jax.Array) -> jax.Array:
    return bias.astype(like.dtype)[None, None, :]


class MLP(nn.Module):
    """The standard MLP: [s; flatten(p)] -> `head_depth` (1) hidden layers of `head_width` (D + 3 P^2) with SiLU -> pixels."""

    config: config.Model

    @nn.compact
    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        x = jnp.concatenate([s.astype(dtype), p.reshape(-1).astype(dtype)])
        width = model.head_width or x.size
        for i in range(model.head_depth or 1):
            x = nn.silu(Linear((width,), ("head_in", "head_out"), dtype=dtype, name=f"hidden_{i}")(x))
        return Linear((p.size,), ("head_in", "head_out"), init=_last(model), dtype=dtype, name="out")(x).reshape(p.shape)


def _last(model: config.Model) -> str:
    return "zeros" if model.head_zero_init else "fan_in"


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


class IntraPatchAttention(nn.Module):
    """A small transformer on the P^2 pixels of the patch: `head_depth` (2) DiT blocks of `head_width` (64), conditioned on s.

    The paper gives only its size (630M in all). Here s reaches the pixels twice: through LayerNorm, adaLN by t_emb and a linear
    map it becomes a coarse patch that joins the noisy pixels, and SiLU(t_emb + s) modulates every block.
    """

    config: config.Model

    @nn.compact
    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        width, grid = model.head_width or 64, p.shape[:2]
        t = nn.silu(t_emb.astype(jnp.float32))
        shift, scale = Linear((2, model.width), ("embed", None, "head_out"), dtype=dtype, name="coarse_modulation")(t)
        coarse = modulate(layer_norm(s), shift, scale)
        coarse = Linear((p.size,), ("embed", "head_out"), dtype=dtype, name="coarse")(coarse).reshape(-1, 3)
        condition = nn.silu(t_emb.astype(jnp.float32) + s.astype(jnp.float32)).astype(dtype)[None, :]
        x = jnp.concatenate([p.reshape(-1, 3).astype(dtype), coarse], axis=-1)
        x = Linear((width,), ("head_in", "head_out"), dtype=dtype, name="embed")(x)
        for i in range(model.head_depth or 2):
            x = Block(max(width // 64, 1), grid, "xla", dtype=dtype, name=f"block_{i}")(x, condition)
        modulation = Linear((2, width), ("embed", None, "head_out"), dtype=dtype, name="modulation")(condition)
        x = modulate(layer_norm(x), modulation[:, 0], modulation[:, 1])
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
        UserError: for a name that is not in HEADS, a U-Net deeper than the patch allows, or an attention head whose width no
            2-D RoPE fits.
    """
    if model.head not in HEADS:
        raise UserError(f"model.head={model.head!r} is unknown: it is one of {', '.join(HEADS)}")
    if model.head == "unet":
        depth, p = unet_depth(model), model.patch_size
        if not 1 <= depth <= 8 or p % 2**depth:
            raise UserError(
                f"model.head_depth={depth} halves the patch {depth} times, but model.patch_size={p} is not a multiple of "
                f"{2 ** max(depth, 1)}: use fewer stages or another patch size"
            )
    width = model.head_width or 64
    heads = max(width // 64, 1)
    if model.head == "attention" and (width % heads or width // heads % 4):
        raise UserError(f"model.head_width={width} does not fit model.head=attention: use a multiple of 64, or of 4 below 64")
