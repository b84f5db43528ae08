"""Sums and products in half precision whose gradients are summed in float32.

What is broadcast (a bias, a gate, learnt positions) has a gradient that is a sum over all that it met: tokens, or a million
pixels. In bfloat16 XLA may round it after each term, as it does on a CPU, and the biases of a head were then off by a third.
Here that sum is taken in float32 and rounded once, as PyTorch does. What runs forwards, and what is kept, stays as it was.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


def spread(vector: jax.Array, ndim: int) -> jax.Array:
    """Prepends axes of length one, so that `vector` meets an array of rank `ndim` without implicit broadcasting of ranks."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in x's dtype; y is broadcast over x's leading axes, and over those of a map outside."""
    return _plain_add(x, y) if x.dtype == jnp.float32 else _add(x, y)


def scale(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in x's dtype; y may have length one along an axis."""
    return _plain_scale(x, y) if x.dtype == jnp.float32 else _scale(x, y)


def _plain_add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + spread(y.astype(x.dtype), x.ndim)


def _plain_scale(x: jax.Array, y: jax.Array) -> jax.Array:
    return y.astype(x.dtype) * x


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
    """What the backward pass needs of an array whose values it does not read."""

    shape: tuple[int, ...]
    dtype: Any


def _like(array: jax.Array) -> _Like:
    return _Like(array.shape, array.dtype)


def _sum_to(cotangent: jax.Array, like: _Like) -> jax.Array:
    """The float32 cotangent of a broadcast, summed to what was broadcast."""
    padded = (1,) * (cotangent.ndim - len(like.shape)) + like.shape
    axes = [axis for axis, size in enumerate(padded) if size == 1 != cotangent.shape[axis]]
    return jnp.sum(cotangent, axes, keepdims=True).reshape(like.shape).astype(like.dtype)


_add, _scale = jax.custom_vjp(_plain_add), jax.custom_vjp(_plain_scale)
_add.defvjp(
    lambda x, y: (_plain_add(x, y), _like(y)),
    lambda like, cotangent: (cotangent, _sum_to(cotangent.astype(jnp.float32), like)),
)
_scale.defvjp(
    lambda x, y: (_plain_scale(x, y), (x, y)),
    lambda kept, cotangent: (
        cotangent * kept[1].astype(cotangent.dtype),
        _sum_to(cotangent.astype(jnp.float32) * kept[0].astype(jnp.float32), _like(kept[1])),
    ),
)
