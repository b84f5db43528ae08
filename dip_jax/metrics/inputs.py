"""Sets of images to judge and to judge by: drawn by a model while they are judged, read from a dataset, a file or memory."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dip_jax import config
from dip_jax.data import prepared
from dip_jax.metrics import image_sets
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile
from dip_jax.models import dip
from dip_jax.reporting import figures
from dip_jax.runtime import sharding
from dip_jax.sampling import trajectories
from dip_jax.sampling.labels import interleave
from dip_jax.typing import Params

_READERS = 16  # threads that decode a dataset's images
_SHOWN = 8  # samples and training images of a class that the report shows
_MOST_SHOWN = 2000


def drawn_samples(
    model: dip.DiP,
    params: Params,
    *,
    count: int,
    seed: int,
    options: config.Sample,
    name: str = "samples",
) -> ImageSet:
    """Samples that are drawn while they are judged, labels interleaved; sample i depends on (seed, i, label) alone.

    Of several hosts all must read the set to its end; all devices share each batch, which is `options.batch_size` per host.
    """
    labels = interleave(range(model.config.num_classes), count)
    options = dataclasses.replace(options, batch_size=options.batch_size * jax.process_count())

    def batches(size: int) -> Iterator[np.ndarray]:
        arguments = {"labels": labels, "seed": seed, "options": options, "mesh": sharding.make_mesh(config.Mesh())}
        for _, images in trajectories.draw_batches(model, params, **arguments):
            for start in range(0, len(images), size):
                yield images[start : start + size]

    return ImageSet(name, count, (*model.config.image_size, 3), batches, labels)


def dataset_images(dataset: prepared.Dataset, *, count: int | None = None, phase: float = 0.0) -> ImageSet:
    """The images of a prepared dataset, read when they are needed: all of them, or `count` with labels, spread evenly over it.

    `phase` in [0, 1) shifts the chosen records by that part of their distance: other phases give other images.
    """
    total = len(dataset)
    chosen = (
        np.arange(total) if count is None else ((np.arange(min(count, total)) + phase) * total / min(count, total)).astype(int)
    )
    labels = None if count is None else np.array([dataset.label(i) for i in chosen.tolist()], np.int32)

    def batches(size: int) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(chosen), size):
                rows = chosen[start : start + size].tolist()
                yield np.stack([record["image"] for record in pool.map(dataset.__getitem__, rows)])

    name = f"{dataset.folder.parent.name}/{dataset.folder.name}"
    part = "" if count is None else f":{len(chosen)}:{phase}"
    shape = (dataset.image_size, dataset.image_size, 3)
    return ImageSet(name, len(chosen), shape, batches, labels, f"{dataset.fingerprint}:{dataset.image_size}{part}")


def keeping(images: ImageSet, shown: list[np.ndarray]) -> ImageSet:
    """The same set; its first images are kept in `shown` as they pass, enough of every class for the report."""
    room = min(_SHOWN * len(np.unique(images.labels)), _MOST_SHOWN)

    def batches(size: int) -> Iterator[np.ndarray]:
        for batch in images.batches(size):
            missing = room - sum(map(len, shown))
            if missing > 0:
                shown.append(batch[:missing].copy())
            yield batch

    return dataclasses.replace(images, batches=batches)


def pictures(shown: Sequence[np.ndarray], images: ImageSet | None) -> figures.Labelled:
    """What `keeping` kept of `images`; nothing where there are none."""
    if images is None:
        return figures.Labelled(np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32))
    return figures.Labelled(np.concatenate(shown), images.labels[: sum(map(len, shown))])


def with_progress(images: ImageSet) -> ImageSet:
    """The same set, which shows on stderr how far it was read, how fast, and how long it still takes."""

    def batches(size: int) -> Iterator[np.ndarray]:
        with tqdm(total=images.count, unit=" images", desc=images.name, disable=None) as bar:
            for batch in images.batches(size):
                yield batch
                bar.update(len(batch))

    return dataclasses.replace(images, batches=batches)


def sample_set(samples: Any) -> ImageSet:
    """Samples to judge: an `ImageSet`, uint8 [N, H, W, 3], or the path of an .npz of such.

    Raises:
        UserError: the file is missing or malformed.
    """
    if isinstance(samples, ImageSet):
        return samples
    return image_sets.from_array(samples) if isinstance(samples, np.ndarray) else image_sets.from_npz(samples)


def reference_set(reference: Any, *, image_size: int) -> ImageSet | ReferenceFile:
    """What to judge by: as `sample_set`, or the path of an ADM reference .npz or of a dataset directory.

    Raises:
        UserError: the file or directory is missing or malformed.
    """
    if isinstance(reference, ImageSet | ReferenceFile):
        return reference
    if isinstance(reference, np.ndarray):
        return image_sets.from_array(reference)
    if os.fspath(reference).endswith(".npz"):
        return image_sets.read_reference(reference)
    return dataset_images(prepared.open_dataset(reference, image_size=image_size))
