"""The pieces of the transformer: norms, RoPE, attention, SwiGLU, adaLN.

Parameters are float32; products run in the module's `dtype`; norms, softmax and RoPE stay float32.
Activations have any leading axes: the backbone calls with [B, N, D], the pixel-token head with [P * P, d].
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dip_jax.models.linear import PRODUCT, Fused, Linear, modulation, named, ones, unstack
from dip_jax.models.rounding import scale, spread
from dip_jax.runtime import target
from dip_jax.runtime.sharding import constrain
from dip_jax.typing import Axes


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, eps 1e-6; float32 out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.parts(x, 1)[0]

    @nn.compact
    def parts(self, x: jax.Array, count: int) -> list[jax.Array]:
        """The result as so many equal parts of the last axis: cut from x, so that no float32 result is written to be cut."""
        scale = self.param("scale", named(ones, ("norm",)), (x.shape[-1],)).astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6)
        pairs = zip(jnp.split(x, count, -1), jnp.split(scale, count), strict=True)
        return [part.astype(jnp.float32) * inverse * spread(by, x.ndim) for part, by in pairs]


def layer_norm(x: jax.Array) -> jax.Array:
    """(x - mean) / std over the last axis, eps 1e-6, no affine; float32 out."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: x (1 + scale) + shift, float32; shift and scale broadcast over the token axis."""
    return x * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)


def rope_table(grid: tuple[int, int], head_dim: int, context: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [N, 1, head_dim / 2] of 2-D rotary positions on an (h, w) grid of tokens.

    Positions run over linspace(0, 16, n), endpoint included, along each axis whatever n is; the frequencies are
    10000^(-4 i / head_dim), and each serves x, then y. `context` tokens before the image's have no place: they are not rotated.
    """
    h, w = grid
    ys, xs = np.meshgrid(np.linspace(0, 16, h), np.linspace(0, 16, w), indexing="ij")
    frequencies = 10000.0 ** -(np.arange(0, head_dim, 4) / head_dim)
    angles = np.stack([np.outer(xs.ravel(), frequencies), np.outer(ys.ravel(), frequencies)], axis=-1)
    angles = np.pad(angles.reshape(h * w, 1, head_dim // 2), ((context, 0), (0, 0), (0, 0)))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def sincos_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """DiT's fixed position embedding [N, width] of an (h, w) grid of tokens: sin and cos of x, then of y, a quarter each.

    Positions count tokens from 0; the frequencies are 10000^(-4 i / width).
    """
    ys, xs = np.meshgrid(*map(np.arange, grid), indexing="ij")
    frequencies = 10000.0 ** -(np.arange(0, width, 4) / width)
    angles = [np.outer(position.ravel(), frequencies) for position in (xs, ys)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=-1).astype(np.float32)


def rotate(halves: Sequence[jax.Array], table: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Applies `rope_table` to the two halves [..., N, K, head_dim / 2] of queries or keys, in float32.

    Pair i is (x[i], x[i + head_dim / 2]): halves instead of neighbours, which spares lane shuffles. `jobs/convert.py` permutes
    the columns of checkpoints that rotate neighbours.
    """
    a, b = halves
    cos, sin = (spread(jnp.asarray(part), a.ndim) for part in table)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention_implementation(choice: str, dtype: Any, *, tokens: int, head_dim: int, frozen: bool = False) -> str:
    """Resolves "auto": cuDNN on a mesh of GPUs for what it takes (half precision, sides it can tile), XLA elsewhere."""
    if choice != "auto":
        return choice
    taken = dtype == jnp.bfloat16 and (frozen or tokens % 2 == 0) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if target.platform() == "gpu" and taken else "xla"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, choice: str, dtype: Any, frozen: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v of [..., N, K, head width], softmax in float32; `frozen`: nobody asks for its gradient."""
    if target.platform() == "cpu":  # where JAX's own products of halves run in float32 anyway: linear.py, `dot`
        q, k, v = (part.astype(jnp.float32) for part in (q, k, v))
    chosen = attention_implementation(choice, dtype, tokens=q.shape[-3], head_dim=q.shape[-1], frozen=frozen)
    if target.platform() == "tpu" and chosen == "xla" and not frozen:
        return attend_in_few_passes(q, k, v)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function adds bfloat16 to float32
        return jax.nn.dot_product_attention(q, k, v, implementation=chosen).astype(dtype)


@jax.custom_vjp
def attend_in_few_passes(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` for a TPU, with half the memory traffic of JAX's own in the backward pass.

    Of its [K, N, N] numbers the softmax and the gradient by the scores are written once each, in q's dtype, in which products
    read them; JAX's own writes exponentials in float32 and reads them three times. For that the result and the softmax's
    sums are kept, and the queries are made again instead (`linear.multiply_apart`).
    """
    return _attend(q, k, v)[0]


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("...qkh,...skh->...kqs", q, k, preferred_element_type=jnp.float32) * np.float32(q.shape[-1] ** -0.5)


def _exponentials(q: jax.Array, k: jax.Array) -> jax.Array:
    scores = _scores(q, k)
    return jnp.exp(scores - jnp.max(scores, -1, keepdims=True))  # in one pass with the product, if nobody else needs the maxima


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    exponentials = _exponentials(q, k)
    total = checkpoint_name(jnp.sum(exponentials, -1, keepdims=True), PRODUCT)
    y = checkpoint_name(jnp.einsum("...kqs,...skh->...qkh", (exponentials / total).astype(q.dtype), v), PRODUCT)
    return y, (q, k, v, y, total)


def _attend_backward(kept: tuple[jax.Array, ...], of_y: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, y, total = kept
    softmax = lax.optimization_barrier((_exponentials(q, k) / total).astype(q.dtype))
    of_v = jnp.einsum("...kqs,...qkh->...skh", softmax, of_y)
    of_softmax = jnp.einsum("...qkh,...skh->...kqs", of_y, v, preferred_element_type=jnp.float32)
    mean = jnp.swapaxes(jnp.sum(of_y.astype(jnp.float32) * y.astype(jnp.float32), -1), -1, -2)  # of of_softmax, by softmax
    of_scores = softmax.astype(jnp.float32) * (of_softmax - mean[..., None]) * np.float32(q.shape[-1] ** -0.5)
    of_scores = lax.optimization_barrier(of_scores.astype(q.dtype))
    of_q = jnp.einsum("...kqs,...skh->...qkh", of_scores, k)
    return of_q, jnp.einsum("...kqs,...qkh->...skh", of_scores, q), of_v


attend_in_few_passes.defvjp(_attend, _attend_backward)


class Attention(nn.Module):
    """Multi-head self-attention with RMSNorm on q and k per head, then 2-D RoPE; x [..., N, D] -> [..., N, D].

    Attributes:
        grid: (h, w) with h * w = N, or N less the in-context tokens.
        lead: logical names of the axes before D where activations are pinned to the mesh; () inside a vmapped head.
    """

    num_heads: int
    grid: tuple[int, int]
    implementation: str = "auto"
    lead: Axes = ()
    dtype: Any = jnp.float32
    context: int = 0  # in-context tokens, which come first

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        head_dim = width // self.num_heads
        qkv = Fused((3, width), ("embed", None, "heads"), heads=self.num_heads, dtype=self.dtype, name="qkv")
        q, k, v = qkv(x)
        table = rope_table(self.grid, head_dim, self.context)
        q = rotate(RMSNorm(name="q_norm").parts(q, 2), table).astype(self.dtype)
        k = rotate(RMSNorm(name="k_norm").parts(k, 2), table).astype(self.dtype)
        if self.lead:
            q, k, v = (constrain(part, *self.lead, "act_heads", None) for part in (q, k, v))
        y = attend(q, k, v, choice=self.implementation, dtype=self.dtype).reshape(*x.shape[:-1], width)
        return Linear((width,), ("heads", "embed"), dtype=self.dtype, name="proj")(y)


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x)) without biases; inner width int(2 * 4D / 3); x [..., D] -> [..., D]."""

    lead: Axes = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        inner = int(2 * 4 * width / 3)
        gate, up = Fused((2, inner), ("embed", None, "mlp"), dtype=self.dtype, name="gate_up")(x)
        hidden = nn.silu(gate) * up
        if self.lead:
            hidden = constrain(hidden, *self.lead, "act_mlp")
        return Linear((width,), ("mlp", "embed"), bias=False, dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """One DiT block with adaLN (recipe, "Backbone"): x [..., N, D], condition c [..., 1, D_c] -> [..., N, D].

    The condition is already SiLU(...): adaLN is a bare linear map, and starts like any other linear map (not at zero). Where it
    was applied ahead, its result `adaln` [..., 1, 6, D] comes instead of c.
    """

    num_heads: int
    grid: tuple[int, int]
    implementation: str = "auto"
    lead: Axes = ()
    dtype: Any = jnp.float32
    context: int = 0  # in-context tokens, which come first

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array | None, adaln: jax.Array | None = None) -> jax.Array:
        kind = {"lead": self.lead, "dtype": self.dtype}
        if adaln is None:
            adaln = modulation(6, x.shape[-1], dtype=self.dtype, name="modulation")(c)
        if self.lead:  # left sharded over tensor, XLA adds up the wrong parts on a data x fsdp x tensor mesh
            adaln = constrain(adaln, self.lead[0], None, None, "act_embed")
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = unstack(adaln, -2)
        attention = Attention(self.num_heads, self.grid, self.implementation, context=self.context, name="attention", **kind)
        x = x + scale(attention(modulate(RMSNorm(name="norm1")(x), shift_a, scale_a).astype(self.dtype)), gate_a)
        mlp = SwiGLU(name="mlp", **kind)
        return x + scale(mlp(modulate(RMSNorm(name="norm2")(x), shift_m, scale_m).astype(self.dtype)), gate_m)


class FinalLayer(nn.Module):
    """The DiT's own output: LayerNorm, adaLN, linear map, both zero at the start; x [B, N, D], c [B, 1, D] -> [B, N, O].

    `adaln` [B, 1, 2, D] as in `Block`.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array | None, adaln: jax.Array | None = None) -> jax.Array:
        if adaln is None:
            adaln = modulation(2, x.shape[-1], init="zeros", dtype=self.dtype, name="modulation")(c)
        shift, scale = unstack(constrain(adaln, "batch", None, None, "act_embed"), -2)
        x = modulate(layer_norm(x), shift, scale)
        return Linear((self.features,), ("embed", "pixels"), init="zeros", dtype=self.dtype, name="linear")(x)
