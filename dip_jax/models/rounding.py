"""Sums and products in half precision whose gradients are summed in float32.

What is broadcast (a bias, a gate, learnt positions) has a gradient that is a sum over all that it met: tokens, or a million
pixels. In bfloat16 XLA may round after each term, and the biases of a head were then off by a third. Here the sum and its
gradient are taken in float32 and rounded once, as PyTorch does; the compiler fuses the conversions, and nothing is kept wider.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def spread(vector: jax.Array, ndim: int) -> jax.Array:
    """Prepends axes of length one, so that `vector` meets an array of rank `ndim` without implicit broadcasting of ranks."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in x's dtype; y is broadcast over x's leading axes, and over those of a map outside."""
    if x.dtype == jnp.float32:
        return x + spread(y.astype(jnp.float32), x.ndim)
    kept = jnp.finfo(x.dtype)  # XLA may skip a conversion there and back
    y = lax.reduce_precision(y.astype(jnp.float32), kept.nexp, kept.nmant)
    return (x.astype(jnp.float32) + spread(y, x.ndim)).astype(x.dtype)


def scale(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in x's dtype; y may have length one along an axis."""
    return y.astype(jnp.float32) * x if x.dtype == jnp.float32 else _scale(x, y)


@functools.partial(jax.checkpoint, prevent_cse=False)  # or x would be kept in float32 for the backward pass
def _scale(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * y.astype(jnp.float32)).astype(x.dtype)
