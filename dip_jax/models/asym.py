"""Rank-asymmetric prediction (AsymFlow, Chen et al. 2026): noise is predicted in a small subspace of a patch only.

    s = x - P eps,  P = A A^T                                      what the network is asked for, by patch      (1)
    v = P s + (I - P)(s - x_t) / m,  m = max(1 - t, t_clip)         what it says about the velocity              (2)
    x_hat = s + P (x_t + (m - 1) s)                                (2) as an image: v = (x_hat - x_t) / m       (3)
    A = the r leading eigenvectors of sum p p^T over patches p of training images in [-1, 1], not centred       (4)

A [3 P^2, r] is orthonormal and lies among the parameters under `SUBSPACE`; it is not trained. With r = 0 this is the prediction
of x, with r = 3 P^2 that of v. `DiP.apply` gives (3), so that everything outside the network sees a prediction of x.
"""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, UInt8

SUBSPACE = "subspace"
_TOGETHER = 16  # images in one product


def to_image(
    said: Float[jax.Array, "B N P P 3"],
    x_t: Float[jax.Array, "B N P P 3"],
    t: Float[jax.Array, "B"],
    basis: Float[jax.Array, "E r"],
    *,
    t_clip: float,
) -> Float[jax.Array, "B N P P 3"]:
    """Equation (3), float32: what the network said of the noisy patches, and A; no gradient reaches A."""
    basis = lax.stop_gradient(basis.astype(jnp.float32))
    m = jnp.maximum(1 - t.astype(jnp.float32), t_clip)[:, None, None, None, None]
    said, x_t = said.astype(jnp.float32), x_t.astype(jnp.float32)
    rows = (x_t + (m - 1) * said).reshape(*said.shape[:2], -1)
    exact = {"precision": lax.Precision.HIGHEST}  # an accelerator's default would round to bfloat16
    inside = jnp.matmul(jnp.matmul(rows, basis, **exact), basis.T, **exact)
    return said + inside.reshape(said.shape)


def find_subspace(images: Iterable[UInt8[np.ndarray, "H W 3"]], *, patch_size: int, rank: int) -> Float[np.ndarray, "E r"]:
    """Equation (4) in one pass, float32 [3 P^2, r]; each vector's largest entry is positive, so that the signs are settled."""
    size = 3 * patch_size**2
    gram, images = np.zeros((size, size), np.float64), iter(images)
    while some := list(itertools.islice(images, _TOGETHER)):
        grids = [x.reshape(x.shape[0] // patch_size, patch_size, -1, patch_size, 3).transpose(0, 2, 1, 3, 4) for x in some]
        rows = np.concatenate([grid.reshape(-1, size) for grid in grids]).astype(np.float32) / 127.5 - 1
        gram += rows.T @ rows
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]  # eigh sorts from the smallest
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return (vectors * np.sign(largest)).astype(np.float32)
