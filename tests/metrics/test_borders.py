"""The step across patch borders: against a loop over pixels, and on images whose grid is known."""

import numpy as np
import pytest

from dip_jax.errors import UserError
from dip_jax.metrics import borders, image_sets


def ratio(images, patch_size):
    steps = borders.BorderSteps(patch_size, images.shape[1:])
    seen = borders.watching(image_sets.from_array(images), steps)
    assert np.array_equal(np.concatenate(list(seen.batches(2))), images)
    return steps.ratio()


def by_pixels(images, patch_size):
    kinds = {True: [], False: []}
    for image in images.astype(float):
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                if x + 1 < image.shape[1]:
                    kinds[(x + 1) % patch_size == 0].append(np.abs(image[y, x + 1] - image[y, x]).mean())
                if y + 1 < image.shape[0]:
                    kinds[(y + 1) % patch_size == 0].append(np.abs(image[y + 1, x] - image[y, x]).mean())
    return np.mean(kinds[True]) / np.mean(kinds[False])


@pytest.mark.parametrize("shape, patch_size", [((3, 8, 8, 3), 4), ((5, 12, 8, 3), 2), ((2, 6, 12, 3), 6)])
def test_it_is_the_loop_over_pixels(shape, patch_size):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    images[:, : patch_size // 2] //= 3  # rows and columns differ
    assert ratio(images, patch_size) == pytest.approx(by_pixels(images, patch_size), rel=1e-12)


def test_a_grid_shows_and_the_same_grid_displaced_does_not():
    noise = np.random.default_rng(1).integers(0, 20, (4, 32, 32, 3))
    tiles = np.random.default_rng(2).integers(0, 200, (4, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    images = (noise + tiles).astype(np.uint8)
    assert ratio(images, 8) > 4 and ratio(np.roll(images, 3, axis=(1, 2)), 8) < 1.2
    assert 0.9 < ratio(noise.astype(np.uint8), 8) < 1.1


def test_where_there_is_nothing_to_compare_there_is_no_number():
    assert ratio(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8), 8) is None
    assert ratio(np.full((2, 8, 8, 3), 7, np.uint8), 4) is None


@pytest.mark.parametrize("patch_size", [1, 3, 16])
def test_patches_that_do_not_tile_the_images_are_refused(patch_size):
    with pytest.raises(UserError, match=f"patch_size={patch_size} does not tile images of 8x8"):
        borders.BorderSteps(patch_size, (8, 8, 3))
