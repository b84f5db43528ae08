"""Exact rewrites of the U-Net's convolutions on small maps, for one patch x [r, r, I]; kernels are the plain network's.

Sums are only reordered, so values agree with the plain form to float32 rounding, gradients too:
    convolve(x, k)                  = conv3x3(x, k), zero padding 1                                         (1)
    convolve_upsampled(x, k)        = conv3x3(upsample2(x), k): one 2x2 convolution per output parity       (2)
    convolve_transposed(x, u, b, k) = conv3x3(lift(x, u) + b, k), lift the transposed convolution of stride 2
                                    = such 2x2 convolutions with composed kernels, plus a constant map      (3)
    conv3x3(concat[a, b], [k_a; k_b]) = conv3x3(a, k_a) + conv3x3(b, k_b): the caller never concatenates    (4)
Along one axis both (2) and (3) are a transposed convolution of stride 2 with a kernel e of four taps, e[m] being read by output
2 i + m - 1 of input i; accelerators run it as that. On maps up to 2x2 everything is one dense product over all positions:
convolutions would run at a twentieth of the speed. Kernels are composed in float32 and converted once.
What depends on platform or amount of work is decided here: DENSE_SIDE, `composes`, `_stretch`, `count_groups`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dip_jax import config
from dip_jax.models.linear import dot
from dip_jax.models.rounding import add
from dip_jax.runtime import target

DENSE_SIDE = 2  # largest input map that is multiplied densely
GROUP_BYTES = 8 * 2**20  # of the widest activation of a group: about what a CPU caches
MOST_GROUPS = 8  # every group is compiled on its own, and its gradients of the kernels are added up
LAYOUT = ("NHWC", "HWIO", "NHWC")
AXES = ("images", "patches")  # names of the two axes that a head is mapped over

Taps = tuple[tuple[tuple[int, ...], ...], ...]  # [p, q, L] of zeros and ones; a tuple, so that it can be a static argument

# Which taps m of e a parity a of the output reads, in order of the inputs that they meet.
_PARITY: Taps = tuple(tuple(tuple(int(m == tap) for m in range(4)) for tap in taps) for taps in ((3, 1), (2, 0)))
# Which of its taps m a pair of (parity that the input is lifted to, tap of the 3x3 kernel) adds to: [1, m, (parity, tap)].
_LIFTED: Taps = (tuple(tuple(int(a - tap + 2 == m) for a in (0, 1) for tap in range(3)) for m in range(4)),)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _combine(kernel: jax.Array, chosen: Taps) -> jax.Array:
    """kernel [L, ...], chosen [p, q, L] of zeros and ones -> [p, q, ...]: the sums of the chosen taps.

    Made of slices and sums, but differentiated as a product: on a CPU each is the quicker of the two (`docs/performance.md`).
    """

    def add(taps: tuple[int, ...]) -> jax.Array:
        return functools.reduce(jnp.add, [kernel[a] for a, one in enumerate(taps) if one] or [jnp.zeros_like(kernel[0])])

    return jnp.stack([jnp.stack([add(taps) for taps in row]) for row in chosen])


@_combine.defjvp
def _combine_jvp(chosen: Taps, kernel: tuple[jax.Array], tangent: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    weights = jnp.asarray(chosen, tangent[0].dtype)
    return _combine(*kernel, chosen), jnp.tensordot(weights, *tangent, axes=1, precision=lax.Precision.HIGHEST)


def _both(kernel: jax.Array, chosen: Taps) -> jax.Array:
    """`_combine` along both axes: kernel [L, L, I, O], chosen [p, q, L] -> [p, q, p, q, I, O], rows first."""
    rows = _combine(kernel, chosen)  # [p, q, L, I, O]
    return _combine(jnp.moveaxis(rows, 2, 0), chosen).transpose(2, 3, 0, 1, 4, 5)


@functools.cache
def _reads(side: int, *, stride: int) -> Taps:
    """[i, k, m]: 1 where output row k meets tap m at input row i; stride 1: a 3x3 kernel, stride 2: e."""
    first = -1  # of the taps, as an offset of the output
    taps = 3 if stride == 1 else 4

    def met(i: int, k: int, m: int) -> bool:
        return i - k == m + first if stride == 1 else k - 2 * i == m + first

    return tuple(tuple(tuple(int(met(i, k, m)) for m in range(taps)) for k in range(side * stride)) for i in range(side))


def _matrix(kernel: jax.Array, side: int, *, stride: int = 1) -> jax.Array:
    """The dense form on a map of this side: [(i, j, I), (k, l, O)]."""
    whole = _both(kernel, _reads(side, stride=stride))  # [i, k, j, l, I, O]
    inputs, outputs = side * side * kernel.shape[2], (side * stride) ** 2 * kernel.shape[3]
    return whole.transpose(0, 2, 4, 1, 3, 5).reshape(inputs, outputs)


def _dense(x: jax.Array, matrix: jax.Array, side: int) -> jax.Array:
    return (x.reshape(-1) @ matrix.astype(x.dtype)).reshape(side, side, -1)


def _conv(x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], ...], *, stretched: int = 1) -> jax.Array:
    """The convolution of one map, `stretched` by zeros between its inputs."""
    more = {"lhs_dilation": (stretched, stretched), "dimension_numbers": LAYOUT}
    return lax.conv_general_dilated(x[None], kernel.astype(x.dtype), (1, 1), padding, **more)[0]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Equation (1): x [r, r, I], kernel [3, 3, I, O] -> [r, r, O]."""
    if x.shape[0] <= DENSE_SIDE:
        return _dense(x, _matrix(kernel, x.shape[0]), x.shape[0])
    return _conv(x, kernel, ((1, 1), (1, 1)))


def _stretch(x: jax.Array, e: jax.Array) -> jax.Array:
    """The transposed convolution of stride 2 with e [4, 4, I, O]: x [r, r, I] -> [2r, 2r, O].

    Accelerators have it as one operation. A CPU would multiply the zeros between inputs, and takes one convolution per output
    parity; so does what is to suit all platforms.
    """
    side = x.shape[0]
    if side <= DENSE_SIDE:
        return _dense(x, _matrix(e, side, stride=2), 2 * side)
    if target.platform() in ("gpu", "tpu"):
        return _conv(x, e[::-1, ::-1], ((2, 2), (2, 2)), stretched=2)
    merged = _both(e, _PARITY)  # [a, t, b, u, I, O]
    parts = [[_conv(x, merged[a, :, b], ((1 - a, a), (1 - b, b))) for b in (0, 1)] for a in (0, 1)]
    rows = [jnp.stack(row, axis=2) for row in parts]  # [r, r, 2, O]: columns interleave
    return jnp.stack(rows, axis=1).reshape(2 * side, 2 * side, e.shape[-1])


def convolve_upsampled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Equation (2), nearest neighbours: x [r, r, I], kernel [3, 3, I, O] -> [2r, 2r, O]."""
    copied = jnp.concatenate([kernel, kernel])  # [(a, tap), 3, I, O]: each output parity copies the input
    rows = _combine(copied, _LIFTED)[0]  # [m, 3, I, O]
    columns = jnp.moveaxis(rows, 1, 0)
    return _stretch(x, jnp.moveaxis(_combine(jnp.concatenate([columns, columns]), _LIFTED)[0], 0, 1))


def composes(side: int, fan_in: int, features: int, *, patches: int) -> bool:
    """Whether (3) takes fewer multiply-adds with a composed kernel than in the plain order, for so many patches at once."""
    c, o, dense = fan_in, features, side == 1
    plain = patches * side**2 * (4 * c * c + (16 if dense else 36) * c * o)
    composed = patches * side**2 * (4 if dense else 16) * c * o + (16 if dense else 36) * c * c * o
    return composed < plain


def convolve_transposed(x: jax.Array, up: jax.Array, bias: jax.Array, kernel: jax.Array) -> jax.Array:
    """Equation (3): x [r, r, C], up [2, 2, C, C], bias [C], kernel [3, 3, C, O] -> [2r, 2r, O].

    `up[a, b]` is the matrix between input (i, j) and output (2 i + a, 2 j + b).
    """
    side, c, o = x.shape[0], x.shape[-1], kernel.shape[-1]
    exact, kept = {"precision": lax.Precision.HIGHEST}, jnp.finfo(x.dtype)
    # Rounded as the plain order does, and as `DiP.cast` may have done already; XLA may skip a conversion there and back.
    bias = lax.reduce_precision(bias.astype(kernel.dtype), kept.nexp, kept.nmant)
    lifted = up.transpose(2, 0, 1, 3)  # [C, a, b, C]
    if not composes(side, c, o, patches=patches_at_once()):
        y = dot(x, lifted.astype(x.dtype))  # [r, r, a, b, C]
        y = y.transpose(0, 2, 1, 3, 4).reshape(2 * side, 2 * side, c)
        return convolve(add(y, bias), kernel)
    if side == 1:  # of e a single input meets the four middle taps alone
        below = jnp.matmul(lifted.reshape(c, 4 * c), _matrix(kernel, 2), **exact)
        return add(_dense(x, below, 2), _constant(bias, kernel, 2))
    made = jnp.tensordot(up, kernel, axes=((3,), (2,)), **exact)  # [a, b, C, 3, 3, O]
    made = made.transpose(0, 3, 1, 4, 2, 5).reshape(6, 6, c, o)
    columns = _combine(jnp.moveaxis(_combine(made, _LIFTED)[0], 1, 0), _LIFTED)[0]
    return add(_stretch(x, jnp.moveaxis(columns, 0, 1)), _constant(bias, kernel, 2 * side))


def _constant(bias: jax.Array, kernel: jax.Array, side: int) -> jax.Array:
    """conv3x3 of a map of this side that is `bias` [C] everywhere: [side, side, O], other at the border than within."""
    per_tap = jnp.tensordot(bias, kernel, axes=((0,), (2,)), precision=lax.Precision.HIGHEST)  # [3, 3, O]
    inside: Taps = (tuple(tuple(int(0 <= k + tap - 1 < side) for tap in range(3)) for k in range(side)),)
    rows = _combine(per_tap, inside)[0]  # [side, 3, O]
    return jnp.moveaxis(_combine(jnp.moveaxis(rows, 1, 0), inside)[0], 0, 1)


def _average(x: jax.Array) -> jax.Array:
    side = x.shape[0] // 2
    return jnp.mean(x.reshape(side, 2, side, 2, x.shape[-1]), axis=(1, 3))


def _maximum(x: jax.Array) -> jax.Array:
    """Of equals the first in reading order has the whole gradient, as in PyTorch; `jnp.max` would share it out."""
    side = x.shape[0] // 2
    rows = x.reshape(side, 2, side, 2, x.shape[-1])
    columns = _larger(rows[:, :, :, 0], rows[:, :, :, 1])
    return _larger(columns[:, 0], columns[:, 1])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """a where they are equal; NaN where either is, so that the loop sees it."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


# 2x2 pooling, x [r, r, C] -> [r/2, r/2, C], as reshapes: `reduce_window` has a gradient three times slower.
POOLS = {"avg": _average, "max": _maximum}


def patches_at_once() -> int:
    """Over how many patches the head that is being traced is mapped, on each device; 1 where it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    try:
        return max(lax.axis_size(AXES) // math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp")), 1)
    except NameError:
        return 1


def count_groups(model: config.Model, *, images: int, patches: int) -> int:
    """Into how many groups of patches the head's work is split: more than one only for the U-Net on a mesh of CPUs.

    There, XLA's gradient of a convolution's kernel reads the whole batch again for every tap: with 64 patches at base width 64
    it ran at 75 GFLOP/s on two cores, with 256 and more at 15.
    """
    if model.head != "unet" or target.platform() != "cpu":
        return 1
    size = images * patches * model.patch_size**2 * (model.head_width or 64) * 4  # float32, whatever the dtype
    divisors = [n for n in range(1, MOST_GROUPS + 1) if patches % n == 0]
    return next((n for n in divisors if size <= n * GROUP_BYTES), divisors[-1])
