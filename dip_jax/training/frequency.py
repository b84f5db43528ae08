"""The frequency-weighted loss beside the flow loss (DeCo, Ma et al. 2025): errors that an eye would see weigh more.

    L = mean over blocks, channels and frequencies of w (D (M e) D^T)^2,   e = v_hat - v          (1)
    w = mean(Q) / Q, divided by its own mean,   Q = floor((30 q + 50) / 100), at least 1          (2)

M takes RGB to YCbCr, D is the orthonormal DCT of 8x8 blocks, and q are the tables of JPEG's Annex K, luminance for Y and
chrominance for Cb and Cr, scaled in (2) to quality 85. All before the square is linear, so the
difference is transformed once.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dip_jax.typing import Images

BLOCK = 8
_SCALE = 30  # per cent: JPEG's rule at quality 85, 200 - 2 * 85
_LUMINANCE = """
    16 11 10 16 24 40 51 61    12 12 14 19 26 58 60 55    14 13 16 24 40 57 69 56    14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77    24 35 55 64 81 104 113 92    49 64 78 87 103 121 120 101    72 92 95 98 112 100 103 99"""
_CHROMINANCE = """
    17 18 24 47 99 99 99 99    18 21 26 66 99 99 99 99    24 26 56 99 99 99 99 99    47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99    99 99 99 99 99 99 99 99    99 99 99 99 99 99 99 99    99 99 99 99 99 99 99 99"""
# Rows Y, Cb, Cr (JFIF, without the offset, which a difference does not have).
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def frequency_weights() -> Float[np.ndarray, "3 8 8"]:
    """Equation (2) for Y, Cb and Cr; each has mean 1."""
    tables = [np.array(text.split(), np.float64).reshape(BLOCK, BLOCK) for text in (_LUMINANCE, _CHROMINANCE, _CHROMINANCE)]
    inverse = 1 / np.maximum(np.floor((np.stack(tables) * _SCALE + 50) / 100), 1)
    return inverse / inverse.mean(axis=(1, 2), keepdims=True)


def dct_matrix() -> Float[np.ndarray, "8 8"]:
    """D: row k is the k-th cosine, of length 1."""
    k, n = np.ogrid[:BLOCK, :BLOCK]
    return np.sqrt(np.where(k == 0, 1, 2) / BLOCK) * np.cos(np.pi * (2 * n + 1) * k / (2 * BLOCK))


def frequency_loss(said: Images, target: Images) -> Float[Array, ""]:
    """Equation (1), float32: velocities [B, H, W, 3] with H and W multiples of 8."""
    b, h, w, _ = said.shape
    dct, weights, colours = (jnp.asarray(a, jnp.float32) for a in (dct_matrix(), frequency_weights(), _YCBCR))
    blocks = (said - target).reshape(b, h // BLOCK, BLOCK, w // BLOCK, BLOCK, 3)
    exact = {"precision": lax.Precision.HIGHEST}  # an accelerator's default would round to bfloat16
    found = jnp.einsum("bhiwjc,ki,lj,mc->bhwmkl", blocks, dct, dct, colours, **exact)
    return jnp.mean(jnp.square(found) * weights[None, None, None])


def frequency_flops(image_size: tuple[int, int]) -> int:
    """FLOPs of one image's transform, forward; training runs it again backwards."""
    return 2 * image_size[0] * image_size[1] * 3 * (3 + 2 * BLOCK)
