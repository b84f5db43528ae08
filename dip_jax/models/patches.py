"""Images <-> non-overlapping square patches (section 3.2): a reshape and a transpose, nothing else.

Patch n = row * (W / P) + column, row-major; inside a patch pixels are [P, P, C], row-major, channels last.
"""

import jax
from jaxtyping import Float


def patchify(images: Float[jax.Array, "B H W C"], patch_size: int) -> Float[jax.Array, "B N P P C"]:
    """Cuts images [B, H, W, C] into N = HW / P^2 patches [B, N, P, P, C]."""
    b, h, w, c = images.shape
    p = patch_size
    grid = images.reshape(b, h // p, p, w // p, p, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p, p, c)


def unpatchify(patches: Float[jax.Array, "B N P P C"], image_size: tuple[int, int]) -> Float[jax.Array, "B H W C"]:
    """Inverse of `patchify`: patches [B, N, P, P, C] -> images [B, H, W, C] with (H, W) = image_size."""
    b, _, p, _, c = patches.shape
    h, w = image_size
    grid = patches.reshape(b, h // p, w // p, p, p, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
