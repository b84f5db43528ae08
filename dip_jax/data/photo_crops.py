"""Real photographs without a download: random crops of ten colour photographs that two packages carry, as a TFDS builder.

One class per photograph. Crop i of a split has class i mod 10, a side drawn uniformly from 0.8 to 1 of the photograph's
short side, and a uniform position; it is a function of (split, i) alone. Train and validation draw from separate seeds, but
from the same photographs: they overlap.

Example:
    >>> builder = PhotoCrops(config=CropsConfig(64), data_dir="tfds", file_format="array_record")
    >>> builder.download_and_prepare()
    >>> source = builder.as_data_source("train")
"""

import importlib.util
import io
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

# Class -> (package, file inside it). The files lie in the installed wheels: nothing is fetched.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
SPLITS = {"train": (0, 20_000), "validation": (1, 2_000)}  # seed, number of crops up to 128x128
_FULL_SIDE = 128  # TFDS shuffles 1 GiB in memory and more than that with TensorFlow: the largest side of 20,000 raw crops
SMALLEST_SIDE = 0.8  # of the photograph's short side: near enough to the whole to be recognised


def load_photograph(name: str) -> Image.Image:
    """One whole photograph of `PHOTOGRAPHS`, RGB."""
    package, file = PHOTOGRAPHS[name]
    folder = pathlib.Path(importlib.util.find_spec(package).origin).parent
    return Image.open(folder / file).convert("RGB")


class Cropper:
    """Random crops of the photographs; the halved copies that make large crops cheap are kept.

    Args:
        image_size: side of every crop, pixels.
    """

    def __init__(self, image_size: int):
        self._image_size = image_size
        self._levels = [_halvings(load_photograph(name), image_size) for name in PHOTOGRAPHS]

    def crop(self, seed: int, i: int) -> Image.Image:
        """Crop i of the stream `seed`: RGB, image_size x image_size."""
        levels = self._levels[i % len(PHOTOGRAPHS)]
        width, height = levels[0].size
        scale, x, y = np.random.Generator(np.random.PCG64([seed, i])).random(3)
        side = min(width, height) * (SMALLEST_SIDE + (1 - SMALLEST_SIDE) * scale)
        left, top = x * (width - side), y * (height - side)
        # The smallest copy in which the crop still has two pixels per output pixel.
        level = max((k for k in range(len(levels)) if side / 2**k >= 2 * self._image_size), default=0)
        image = levels[level]
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, min((left + side) * across, image.width), min((top + side) * down, image.height))
        return image.resize((self._image_size, self._image_size), Image.Resampling.BICUBIC, box=box)


def _halvings(image: Image.Image, image_size: int) -> list[Image.Image]:
    levels = [image]
    while min(levels[-1].size) >= 4 * image_size:
        levels.append(levels[-1].reduce(2))
    return levels


def count_crops(split: str, *, image_size: int) -> int:
    """Crops of a split: as in `SPLITS` up to 128x128, above it fewer, as many pixels in all (a quarter at 256x256)."""
    whole = SPLITS[split][1]
    return whole if image_size <= _FULL_SIDE else max(1, round(whole * (_FULL_SIDE / image_size) ** 2) // 10) * 10


class CropsConfig(tfds.core.BuilderConfig):
    """A size of crops; its name is the number."""

    def __init__(self, image_size: int):
        super().__init__(name=str(image_size), description=f"{image_size}x{image_size} crops")
        self.image_size = image_size


class PhotoCrops(tfds.core.GeneratorBasedBuilder):
    """The crops as {"image": PNG, "label": class}; 20,000 train and 2,000 validation examples (above 128x128 fewer, see
    `count_crops`), the classes balanced."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description="Random crops of ten photographs from scikit-image and scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(PHOTOGRAPHS)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        size = self.builder_config.image_size
        counts = {split: count_crops(split, image_size=size) for split in SPLITS}
        return {split: self._generate_examples(split, seed, counts[split]) for split, (seed, _) in SPLITS.items()}

    def _generate_examples(self, split: str, seed: int, count: int) -> Iterator[tuple[int, dict]]:
        cropper = Cropper(self.builder_config.image_size)
        for i in tqdm(range(count), desc=f"photo_crops {split}", unit="image"):
            buffer = io.BytesIO()
            cropper.crop(seed, i).save(buffer, "PNG", compress_level=1)
            # Bytes, not an array: TFDS encodes arrays with TensorFlow.
            yield i, {"image": buffer.getvalue(), "label": i % len(PHOTOGRAPHS)}
