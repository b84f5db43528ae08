"""Representation alignment (REPA, Yu et al. 2024): tokens of the backbone, projected, point where the teacher's tokens point.

    L = mean over tokens of (1 - cos(project(s_k), y))        (1)

with s_k [B, N, D] the tokens after block k and y [B, N, D'] the teacher's (`models/dinov2.py`). iREPA (Singh et al. 2025)
projects by one convolution and normalises y over the tokens of each image first.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from dip_jax.models.linear import Linear, Named, fan_in_uniform, named
from dip_jax.models.rounding import add
from dip_jax.typing import Params, PRNGKey, Tokens

_SMALLEST = 1e-8  # a vector shorter than that is divided by that, as torch's cosine_similarity does


class _Mlp(nn.Module):
    """Linear, SiLU, Linear, SiLU, Linear; the hidden width is that of the tokens."""

    features: int
    grid: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = (tokens.shape[-1],)
        hidden = nn.silu(Linear(width, ("embed", "mlp"), dtype=self.dtype, name="in")(tokens))
        hidden = nn.silu(Linear(width, ("mlp", "embed"), dtype=self.dtype, name="hidden")(hidden))
        return Linear((self.features,), ("embed", None), dtype=self.dtype, name="out")(hidden)


class _Conv(nn.Module):
    """One 3x3 convolution over the token grid, zeros around it."""

    features: int
    grid: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = tokens.shape[-1]
        init = fan_in_uniform(9 * width)
        kernel = self.param("kernel", named(init, (None, None, "embed", None)), (3, 3, width, self.features))
        bias = self.param("bias", named(init, (None,)), (self.features,))
        maps = tokens.reshape(tokens.shape[0], *self.grid, width).astype(self.dtype)
        y = lax.conv_general_dilated(
            maps, kernel.astype(self.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return add(y.reshape(*tokens.shape[:2], self.features), bias)


PROJECTORS: dict[str, type[nn.Module]] = {"mlp": _Mlp, "conv": _Conv}


@dataclasses.dataclass(frozen=True)
class Projector:
    """The trained map from the backbone's tokens to the teacher's width. Hashable, so that it can be a static argument.

    Attributes:
        kind: row of PROJECTORS.
        width: D of the backbone.
        features: D' of the teacher.
        grid: (h, w) with h * w = N.
        dtype: of its products.
    """

    kind: str
    width: int
    features: int
    grid: tuple[int, int]
    dtype: str = "bfloat16"

    def init(self, key: PRNGKey) -> Params:
        """Fresh parameters, float32, as PyTorch starts them: weights and biases U(+-1/sqrt(fan_in))."""
        return nn.meta.unbox(self._init_named(key))

    def apply(self, params: Params, tokens: Tokens) -> Float[jax.Array, "B N E"]:
        """Tokens [B, N, D] -> [B, N, D'] in `dtype`."""
        return self._module().apply({"params": params}, tokens)

    def logical_axes(self) -> Any:
        """The tree of `init` with each array replaced by its tuple of logical axis names (see `sharding.RULES`)."""
        return _logical_axes(self)

    def _module(self) -> nn.Module:
        return PROJECTORS[self.kind](self.features, self.grid, jnp.dtype(self.dtype))

    def _init_named(self, key: PRNGKey) -> Any:
        h, w = self.grid
        return self._module().init(key, jnp.zeros((1, h * w, self.width), jnp.float32))["params"]


@functools.cache
def _logical_axes(projector: Projector) -> Any:
    boxes = jax.eval_shape(projector._init_named, jax.random.key(0))
    return jax.tree.map(lambda box: box.axes, boxes, is_leaf=lambda node: isinstance(node, Named))


def spatial_norm(y: Tokens) -> Tokens:
    """iREPA's target: (y - mean) / (std + 1e-6) over the tokens of each image, by channel; std as torch's (divisor N - 1)."""
    y = y.astype(jnp.float32)
    return (y - jnp.mean(y, axis=1, keepdims=True)) / (jnp.std(y, axis=1, keepdims=True, ddof=1) + 1e-6)


def alignment_loss(projected: Tokens, y: Tokens) -> Float[jax.Array, ""]:
    """Equation (1), float32, between 0 and 2; the gradient of a token that is zero is finite."""
    projected, y = projected.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.mean(1 - jnp.sum(_unit(projected) * _unit(y), axis=-1))


def _unit(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), _SMALLEST**2))
