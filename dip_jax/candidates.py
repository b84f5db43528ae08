"""Sets of images to judge: drawn by a model while they are judged, or read from a prepared dataset."""

import concurrent.futures
from collections.abc import Iterator

import jax
import numpy as np

from dip_jax import config, drawing
from dip_jax.data import pipeline
from dip_jax.jobs.sample import interleave
from dip_jax.metrics.image_sets import ImageSet
from dip_jax.models import dip
from dip_jax.typing import Params

_READERS = 16  # threads that decode a dataset's images


def drawn_samples(
    model: dip.DiP,
    params: Params,
    *,
    count: int,
    seed: int,
    options: config.Sample,
    mesh: jax.sharding.Mesh | None = None,
    name: str = "samples",
) -> ImageSet:
    """Samples that are drawn while they are judged, labels interleaved; sample i depends on (seed, i, label) alone."""
    labels = interleave(range(model.config.num_classes), count)

    def batches(size: int) -> Iterator[np.ndarray]:
        arguments = {"labels": labels, "seed": seed, "options": options, "mesh": mesh}
        for _, images in drawing.draw_batches(model, params, **arguments):
            for start in range(0, len(images), size):
                yield images[start : start + size]

    return ImageSet(name, count, (*model.config.image_size, 3), batches, labels)


def dataset_images(dataset: pipeline.Dataset, *, count: int | None = None, phase: float = 0.0) -> ImageSet:
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
