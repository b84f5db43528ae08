"""Sets of images to judge and to judge by: drawn by a model while they are judged, read from a dataset, files or memory."""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from dip_jax import config
from dip_jax.data import prepared, shards
from dip_jax.errors import UserError
from dip_jax.metrics import image_sets, npz_files, picture_folders
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile
from dip_jax.metrics.picture_folders import READERS
from dip_jax.models import dip
from dip_jax.reporting import figures
from dip_jax.runtime import distributed, sharding
from dip_jax.sampling import trajectories
from dip_jax.sampling.labels import interleave
from dip_jax.typing import Params

_SHOWN = 8  # samples and training images of a class that the report shows
_MOST_SHOWN = 2000
_LINES_APART = 60.0  # seconds between two lines of progress where no bar can be drawn


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
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(chosen), size):
                rows = chosen[start : start + size].tolist()
                yield np.stack([record["image"] for record in pool.map(dataset.__getitem__, rows)])

    name = f"{dataset.folder.parent.name}/{dataset.folder.name}"
    part = "" if count is None else f":{len(chosen)}:{phase}"
    shape = (dataset.image_size, dataset.image_size, 3)
    lossy = (f"{name}: its crops are stored as JPEG, which moves distances by more than models differ.",)
    notes = lossy if dataset.info.encoding == "jpeg" else ()
    return ImageSet(name, len(chosen), shape, batches, labels, f"{dataset.fingerprint}:{dataset.image_size}{part}", notes)


def keeping(images: ImageSet, shown: list[tuple[np.ndarray, int]]) -> ImageSet:
    """The same set; (image, label) of the first few of every class are kept in `shown` as they pass, for the report."""
    kept = collections.Counter(label for _, label in shown)

    def batches(size: int) -> Iterator[np.ndarray]:
        passed = 0
        for batch in images.batches(size):
            for image, label in zip(batch, images.labels[passed:].tolist(), strict=False):
                if kept[label] < _SHOWN and len(shown) < _MOST_SHOWN:
                    kept[label] += 1
                    shown.append((image.copy(), label))
            passed += len(batch)
            yield batch

    return dataclasses.replace(images, batches=batches)


def pictures(shown: Sequence[tuple[np.ndarray, int]]) -> figures.Labelled:
    """What `keeping` kept."""
    if not shown:
        return figures.Labelled(np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32))
    images, labels = zip(*shown, strict=True)
    return figures.Labelled(np.stack(images), np.array(labels, np.int32))


def with_progress(images: ImageSet | ReferenceFile) -> ImageSet | ReferenceFile:
    """The same set, which shows on stderr how far it was read: a bar on a terminal, else a line now and then."""
    if isinstance(images, ReferenceFile):
        return dataclasses.replace(images, images=images.images and with_progress(images.images))

    def batches(size: int) -> Iterator[np.ndarray]:
        terminal, done, told = sys.stderr.isatty(), 0, time.monotonic()
        if not terminal:
            distributed.say(f"{images.name}: {images.count} images")
        with tqdm(total=images.count, unit=" images", desc=images.name, disable=not terminal) as bar:
            for batch in images.batches(size):
                yield batch
                bar.update(len(batch))
                done += len(batch)
                if not terminal and time.monotonic() - told > _LINES_APART:
                    distributed.say(f"{images.name}: {done} of {images.count} images")
                    told = time.monotonic()

    return dataclasses.replace(images, batches=batches)


def sample_set(samples: Any) -> ImageSet | ReferenceFile:
    """Samples to judge: an `ImageSet`, uint8 [N, H, W, 3], an .npz of such or of statistics, a folder of pictures, a dataset.

    Raises:
        UserError: there is nothing of that name, or it is malformed.
    """
    if isinstance(samples, ImageSet):
        return samples
    if isinstance(samples, np.ndarray):
        return image_sets.from_array(samples)
    path = pathlib.Path(samples).expanduser()
    if not path.is_dir():
        return npz_files.read_samples(_file(samples))
    if not _is_dataset(path):
        return picture_folders.from_folder(path)
    dataset = _open_dataset(path, image_size=None)
    return dataset_images(dataset, count=len(dataset))


def reference_set(reference: Any, *, image_size: int | None) -> ImageSet | ReferenceFile:
    """What to judge by: as `sample_set`, or the path of an ADM reference .npz.

    Args:
        reference: which.
        image_size: at which a dataset of originals is cropped; None where nobody says.

    Raises:
        UserError: there is nothing of that name, or it is malformed.
    """
    if isinstance(reference, ImageSet | ReferenceFile):
        return reference
    if isinstance(reference, np.ndarray):
        return image_sets.from_array(reference)
    path = pathlib.Path(reference).expanduser()
    if not path.is_dir():
        return npz_files.read_reference(_file(reference))
    return (
        dataset_images(_open_dataset(path, image_size=image_size)) if _is_dataset(path) else picture_folders.from_folder(path)
    )


def _file(path: str | os.PathLike) -> str:
    """The path of something that is no directory here: a file, also in a bucket.

    Raises:
        UserError: there is nothing.
    """
    found = os.path.expanduser(os.fspath(path))
    if not epath.Path(found).is_file():
        raise UserError(f"{path}: no such file or directory; expected an .npz, a folder of pictures, or a dataset directory")
    return found


def _is_dataset(path: pathlib.Path) -> bool:
    return any((folder / shards.DATASET_FILE).is_file() for folder in (path, path / "train"))


def _open_dataset(path: pathlib.Path, *, image_size: int | None) -> prepared.Dataset:
    """At its own size; `image_size` is for a dataset that stores originals."""
    stored = shards.read_info(shards.find_dataset(path)).image_size
    if stored is None and image_size is None:
        raise UserError(f"{path} stores original images, which are of many sizes: prepare crops of them with --image_size=N")
    return prepared.open_dataset(path, image_size=stored or image_size)


def row_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole where two share it; a path that is given twice is numbered."""
    short = [os.path.basename(path.rstrip("/")) for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]
