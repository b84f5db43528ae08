"""Sets of images to judge or to judge by, and what is said of pixels that are in another form."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dip_jax.errors import UserError
from dip_jax.metrics.statistics import Gaussian


@dataclass(frozen=True)
class ImageSet:
    """uint8 images of one size, read when they are needed.

    Attributes:
        name: what messages and the protocol call it.
        count: number of images, N.
        image_shape: (H, W, 3).
        batches: batches(size) yields uint8 [size, H, W, 3] in order; the last may be shorter.
        labels: class of every image, or None.
        fingerprint: names the pixels, so that their features can be kept; None where they cannot.
        notes: sentences about how the images were stored that a reader of their numbers needs.
    """

    name: str
    count: int
    image_shape: tuple[int, int, int]
    batches: Callable[[int], Iterator[np.ndarray]]
    labels: Int[np.ndarray, "N"] | None = None
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReferenceFile:
    """What an .npz named `name` holds: images, statistics of Inception features, or both; None where not."""

    name: str
    images: ImageSet | None
    pool: Gaussian | None = None
    spatial: Gaussian | None = None


def from_array(images: np.ndarray, labels: Int[np.ndarray, "N"] | None = None, *, name: str = "array") -> ImageSet:
    """Images in memory: uint8 [N, H, W, 3].

    Raises:
        UserError: for another dtype or shape, with the expression that mends it.
    """
    if not is_pixels(images.dtype, images.shape):
        extremes = (float(images.min()), float(images.max())) if images.size and images.dtype.kind in "iuf" else None
        raise UserError(f"{name}: {explain(name, images.dtype, images.shape, extremes=extremes)}")

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), size):
            yield images[start : start + size]

    return ImageSet(name, len(images), images.shape[1:], batches, labels, hashlib.sha256(images.tobytes()).hexdigest())


def is_pixels(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    """True for uint8 [N, H, W, 3] with at least one pixel."""
    return dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape


def explain(name: str, dtype: np.dtype, shape: tuple[int, ...], *, extremes: tuple[float, float] | None = None) -> str:
    """What an array that `is_pixels` refuses holds, and the expression that makes pixels of it where there is one.

    Args:
        name: of the array, as the expression writes it.
        dtype, shape: of the array.
        extremes: its lowest and highest value, where they are known.
    """
    values = "" if extremes is None or dtype == np.uint8 else f" with values from {extremes[0]:.4g} to {extremes[1]:.4g}"
    told = f"{name} holds {dtype} {list(shape)}{values}, expected uint8 [N, H, W, 3] of pixels 0..255"
    arranged = _arranged(name, shape)
    if 0 in shape or arranged is None:
        return f"{told} and at least one image"
    if dtype == np.uint8:
        return f"{told}: save {arranged}"
    scaled = None if extremes is None else _scaled(arranged, dtype, *extremes)
    if scaled is None:
        return f"{told}; such values follow no rule that is known here"
    return f"{told}: save np.clip(np.round({scaled}), 0, 255).astype(np.uint8)"


def _arranged(name: str, shape: tuple[int, ...]) -> str | None:
    """The expression that puts channels last and makes three of them."""
    if len(shape) == 3:
        return f"np.repeat({name}[..., None], 3, axis=3)"
    for channels, form in ((3, "{}"), (4, "{}[..., :3]"), (1, "np.repeat({}, 3, axis=3)")):
        for axis, last in ((3, name), (1, f"{name}.transpose(0, 2, 3, 1)")):
            if len(shape) == 4 and shape[axis] == channels:
                return form.format(last)
    return None


def _scaled(pixels: str, dtype: np.dtype, low: float, high: float) -> str | None:
    """The expression that brings values between these two to 0..255."""
    if dtype.kind == "f" and low >= 0 and high <= 1:
        return f"{pixels} * 255"
    if dtype.kind == "f" and -1.5 <= low < 0 and high <= 1.5:  # samplers overshoot [-1, 1] a little
        return f"({pixels} + 1) * 127.5"
    return pixels if low >= 0 and high <= 255 else None
