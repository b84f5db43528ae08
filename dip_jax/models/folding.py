"""Exact rewrites of 3x3 convolutions on small maps, for one patch x [r, r, I]; kernels are ordinary [3, 3, I, O].

Sums are only reordered, so values agree with the plain form to float32 rounding, gradients too:
    convolve(x, k)                      = conv3x3(x, k), zero padding 1                                   (1)
    convolve_upsampled(x, k, nearest)   = conv3x3(upsample2(x), k): one 2x2 conv per output parity        (2)
    conv3x3(concat[a, b], [k_a; k_b])   = conv3x3(a, k_a) + conv3x3(b, k_b): the caller never concatenates (3)
On maps up to 2x2 both are one dense product over all positions, where convolutions run at a twentieth of the speed.
How many patches are folded into one convolution is `count_groups`, the only thing that differs between backends.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from dip_jax import config

DENSE_SIDE = 2  # largest input map that is multiplied densely
GROUP_BYTES = 8 * 2**20  # of the widest activation of a group: about what a CPU caches
MOST_GROUPS = 8  # every group is compiled on its own, and its gradients of the kernels are added up
LAYOUT = ("NHWC", "HWIO", "NHWC")

# Along one axis, parity a of the output meets the taps (0, 1, 2) merged into two: rows are the two merged taps.
_PARITY_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))

Taps = tuple[tuple[tuple[int, ...], ...], ...]  # [p, q, 3] of zeros and ones; a tuple, so that it can be a static argument


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _combine(kernel: jax.Array, chosen: Taps) -> jax.Array:
    """kernel [3, ...], chosen [p, q, 3] of zeros and ones -> [p, q, ...]: the sums of the chosen taps.

    Made of slices and sums, but differentiated as a product: on a CPU each is the quicker of the two (`docs/performance.md`).
    """

    def add(taps: tuple[int, ...]) -> jax.Array:
        return functools.reduce(jnp.add, [kernel[a] for a in range(3) if taps[a]] or [jnp.zeros_like(kernel[0])])

    return jnp.stack([jnp.stack([add(taps) for taps in row]) for row in chosen])


@_combine.defjvp
def _combine_jvp(chosen: Taps, kernel: tuple[jax.Array], tangent: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    weights = jnp.asarray(chosen, tangent[0].dtype)
    return _combine(*kernel, chosen), jnp.tensordot(weights, *tangent, axes=1, precision=lax.Precision.HIGHEST)


@functools.cache
def _selection(side: int, scale: int) -> Taps:
    """S[i, k, a] = 1 where tap a of output row k reads input row i, for an input of `side` rows upsampled by `scale`."""
    out = side * scale

    def reads(i: int, k: int, a: int) -> bool:
        return 0 <= k + a - 1 < out and (k + a - 1) // scale == i

    return tuple(tuple(tuple(int(reads(i, k, a)) for a in range(3)) for k in range(out)) for i in range(side))


def _dense(x: jax.Array, kernel: jax.Array, scale: int) -> jax.Array:
    side, out, features = x.shape[0], x.shape[0] * scale, kernel.shape[-1]
    chosen = _selection(side, scale)
    rows = _combine(kernel, chosen)  # [i, k, b, I, O]
    matrix = _combine(jnp.moveaxis(rows, 2, 0), chosen)  # [j, l, i, k, I, O]
    matrix = matrix.transpose(2, 0, 4, 3, 1, 5).reshape(x.size, out * out * features)
    return (x.reshape(-1) @ matrix.astype(x.dtype)).reshape(out, out, features)


def _conv(x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    return lax.conv_general_dilated(x[None], kernel.astype(x.dtype), (1, 1), padding, dimension_numbers=LAYOUT)[0]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Equation (1): x [r, r, I], kernel [3, 3, I, O] -> [r, r, O]."""
    if x.shape[0] <= DENSE_SIDE:
        return _dense(x, kernel, 1)
    return _conv(x, kernel, ((1, 1), (1, 1)))


def convolve_upsampled(x: jax.Array, kernel: jax.Array, *, method: str) -> jax.Array:
    """Equation (2): x [r, r, I], kernel [3, 3, I, O] -> [2r, 2r, O]; `method` is nearest or bilinear (half-pixel centres)."""
    side = x.shape[0]
    if method == "bilinear":
        return convolve(jax.image.resize(x, (2 * side, 2 * side, x.shape[-1]), "bilinear"), kernel)
    if side <= DENSE_SIDE:
        return _dense(x, kernel, 2)
    rows = _combine(kernel, _PARITY_TAPS)  # [p, t, b, I, O]
    merged = _combine(jnp.moveaxis(rows, 2, 0), _PARITY_TAPS).transpose(2, 0, 3, 1, 4, 5)  # [p, q, t, u, I, O]
    parts = [[_conv(x, merged[a, b], ((1 - a, a), (1 - b, b))) for b in (0, 1)] for a in (0, 1)]
    rows = [jnp.stack(row, axis=2) for row in parts]  # [r, r, 2, O]: columns interleave
    return jnp.stack(rows, axis=1).reshape(2 * side, 2 * side, kernel.shape[-1])


def _average(x: jax.Array) -> jax.Array:
    return jnp.mean(_windows(x), axis=(1, 3))


def _maximum(x: jax.Array) -> jax.Array:
    return jnp.max(_windows(x), axis=(1, 3))


def _windows(x: jax.Array) -> jax.Array:
    side = x.shape[0] // 2
    return x.reshape(side, 2, side, 2, x.shape[-1])


# 2x2 pooling, x [r, r, C] -> [r/2, r/2, C], as reshapes: `reduce_window` has a gradient three times slower.
POOLS = {"avg": _average, "max": _maximum}


def count_groups(model: config.Model, *, images: int, patches: int) -> int:
    """Into how many groups of patches the head's work is split: more than one only for the U-Net on a CPU.

    There, XLA's gradient of a convolution's kernel reads the whole batch again for every tap: with 64 patches at base width 64
    it ran at 75 GFLOP/s on two cores, with 256 and more at 15.
    """
    if model.head != "unet" or jax.default_backend() != "cpu":
        return 1
    size = images * patches * model.patch_size**2 * (model.head_width or 64) * 4  # float32, whatever the dtype
    divisors = [n for n in range(1, MOST_GROUPS + 1) if patches % n == 0]
    return next((n for n in divisors if size <= n * GROUP_BYTES), divisors[-1])


@contextlib.contextmanager
def one_group() -> Iterator[None]:
    """What is traced inside has no groups: the program of an accelerator, to be counted and planned on a CPU."""
    global MOST_GROUPS
    before, MOST_GROUPS = MOST_GROUPS, 1
    try:
        yield
    finally:
        MOST_GROUPS = before
