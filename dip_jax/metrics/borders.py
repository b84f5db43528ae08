"""How far the patches of a model show: the step across their borders over the step inside them.

A model that draws an image patch by patch can fail to join them. Let d be the absolute difference of two neighbouring pixels,
in a row or in a column, averaged over the channels. Then, over all images of a set,

    border = mean of d where the neighbours lie in two patches / mean of d where they lie in one                         (1)

Photographs, whose edges know nothing of the grid, give 1 but for chance; a visible grid gives more.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from dip_jax.errors import UserError
from dip_jax.metrics.image_sets import ImageSet


class BorderSteps:
    """Adds up the two kinds of steps of the images that pass by.

    Args:
        patch_size: side P of the patches, in pixels.
        image_shape: (H, W, 3) of the images.

    Raises:
        UserError: the patches do not tile the images.
    """

    def __init__(self, patch_size: int, image_shape: tuple[int, int, int]):
        height, width, _ = image_shape
        if patch_size < 2 or height % patch_size or width % patch_size:
            raise UserError(
                f"patch_size={patch_size} does not tile images of {height}x{width}: name the side of the model's patches, "
                "such as 16"
            )
        self._patch_size = patch_size
        self._sums, self._counts = np.zeros(2), np.zeros(2, np.int64)  # inside, across

    def add(self, images: np.ndarray) -> None:
        """Takes uint8 [N, H, W, 3]."""
        for axis in (1, 2):
            steps = np.abs(np.diff(images.astype(np.int16), axis=axis)).mean(axis=(0, 3 - axis, 3), dtype=np.float64)
            across = (np.arange(len(steps)) + 1) % self._patch_size == 0
            pairs = len(images) * images.shape[3 - axis]  # neighbours that one entry of `steps` is the mean of
            for kind, chosen in enumerate((~across, across)):
                self._sums[kind] += pairs * steps[chosen].sum()
                self._counts[kind] += pairs * chosen.sum()

    def ratio(self) -> float | None:
        """Equation (1); None where an image is one patch, or nothing inside the patches changes."""
        if not self._counts[1] or not self._sums[0]:
            return None
        inside, across = self._sums / self._counts
        return float(across / inside)


def watching(images: ImageSet, steps: BorderSteps) -> ImageSet:
    """The same set, whose images are added to `steps` as they are read."""

    def batches(size: int) -> Iterator[np.ndarray]:
        for batch in images.batches(size):
            steps.add(batch)
            yield batch

    return dataclasses.replace(images, batches=batches)
