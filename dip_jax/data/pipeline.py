"""From a dataset directory to batches on the devices.

Order is a function of (seed, salt, step), not of iterator state:

    stream    epoch 0, epoch 1, ... one after the other; each a permutation of all records, seeded by (seed, salt, epoch)
    batch k   stream[k * batch_size : (k + 1) * batch_size], whatever the number of hosts, workers or threads

A process reads only the rows of a batch that its own devices hold. Grain reads: chunks of rows in parallel, by threads or by
worker processes, delivered in order; one more thread places finished batches on the devices ahead of the step.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding

from dip_jax import config
from dip_jax.data import images, placement, shards, workers
from dip_jax.errors import UserError
from dip_jax.runtime import sharding

_CHUNK = 16  # most rows per unit of reading: enough to make Grain's cost per unit vanish, few enough to balance threads
_ENDLESS = 1 << 60  # units in the stream; the iterator has no end
_SHARED_BYTES = 1 << 16  # smaller arrays go from process to process through a pipe, which costs less than shared memory
_NEIGHBOURS = 100  # tried in place of a bad record before giving up
_FLIP = 1  # stream number beside the order's, under the same seed


class BadRecordError(UserError):
    """A record that is no usable image or has no valid label; the message names shard and record."""


class Dataset:
    """A prepared dataset, random access: `dataset[i]` -> {"image": uint8 [H, W, 3], "label": int}.

    Args:
        folder: the directory that holds dataset.json.
        image_size: crop size where the dataset stores originals; else None or the stored size.

    Attributes:
        classes: class names, by label.
        fingerprint: SHA-256 that identifies records and order.
        image_size: H = W of every image.
    """

    def __init__(self, folder: pathlib.Path, *, image_size: int | None = None):
        info = shards.read_info(folder)
        if info.image_size is None and image_size is None:
            raise UserError(f"{folder} stores original images: say at which image_size to crop them")
        if info.image_size is not None and image_size not in (None, info.image_size):
            raise UserError(
                f"{folder} holds {info.image_size}x{info.image_size} images where {image_size}x{image_size} are wanted: "
                f"prepare another with --image_size={image_size}, or store originals with --encoding=original"
            )
        images.require_codec(info.encoding)
        self.folder, self.info = folder, info
        self.classes, self.fingerprint = list(info.classes), info.fingerprint
        self.image_size = info.image_size or image_size
        files = [shards.FileInstruction(os.fspath(folder / s.file), s.records, s.records) for s in info.shards]
        self._records = grain.sources.ArrayRecordDataSource(files)

    @property
    def num_classes(self) -> int:
        """Number of classes; labels lie in [0, num_classes)."""
        return len(self.classes)

    def __len__(self) -> int:
        return self.info.num_records

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Record i.

        Raises:
            IndexError: if i is not in [0, len).
            BadRecordError: if the record is damaged.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of a dataset of {len(self)}")
        try:
            label, data = shards.parse_record(self._records[i])
            if not 0 <= label < self.num_classes:
                raise images.BadImageError(f"label {label} is outside [0, {self.num_classes})")
            image = images.pixels(data, self.info.encoding, image_size=self.image_size, stored_size=self.info.image_size)
        except Exception as error:  # ArrayRecord reports a damaged file by several types
            raise BadRecordError(
                f"{self._place(i)}: {error}; restore that shard, or set data.on_bad_record=replace to go on without the record"
            ) from None
        return {"image": image, "label": label}

    def label(self, i: int) -> int:
        """The label of record i, without decoding its image."""
        return shards.parse_record(self._records[i])[0]

    def _place(self, i: int) -> str:
        for shard in self.info.shards:
            if i < shard.records:
                return f"bad record: shard {self.folder / shard.file} record {i}"
            i -= shard.records
        raise AssertionError

    def replaced(self, i: int) -> tuple[dict[str, Any], int]:
        """Record i, or the first good one after it; and how many bad ones were passed over."""
        for skipped in range(_NEIGHBOURS):
            try:
                return self[(i + skipped) % len(self)], skipped
            except BadRecordError as error:
                last = error
        raise last


def open_dataset(path: str | os.PathLike, *, image_size: int | None = None, source: str = "folder") -> Dataset:
    """Opens a directory that `python -m dip_jax prepare` made; its train split where it has several.

    Args:
        path: the directory, or a split's directory inside it.
        image_size: crop size, needed only where the dataset stores originals.
        source: what the dataset would be prepared from, for the message if there is none.

    Raises:
        UserError: if there is no dataset, a shard is missing or of another length, or the image size is another.
    """
    return Dataset(shards.find_dataset(path, source=source), image_size=image_size)


def identity(dataset: Dataset, *, seed: int, batch_size: int, salt: int = 0) -> dict[str, Any]:
    """All that decides which images batch k holds, as JSON values: what a checkpoint stores beside the step."""
    return {"fingerprint": dataset.fingerprint, "seed": seed, "salt": salt, "batch_size": batch_size}


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with another data order than a checkpoint's.

    Raises:
        UserError: naming what differs, with both values.
    """
    for key in now:
        if saved.get(key) != now[key]:
            raise UserError(
                f"the checkpoint was trained with data {key}={saved.get(key)} but this run has {key}={now[key]}: "
                "use the same data, seed and batch size, or start in another workdir"
            )


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, salt: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, salt, epoch)).generate_state(1)[0])


def record_at(positions: Sequence[int], *, num_records: int, seed: int, salt: int = 0) -> list[int]:
    """The records at these positions of the endless shuffled stream."""
    return [
        index_shuffle(
            position % num_records,
            max_index=num_records - 1,
            seed=_epoch_seed(seed, salt, position // num_records),
            rounds=4,
        )
        for position in positions
    ]


def batch_indices(num_records: int, *, batch_size: int, seed: int, salt: int = 0, step: int) -> np.ndarray:
    """The record indices of global batch `step`, int64 [batch_size]."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array(record_at(positions, num_records=num_records, seed=seed, salt=salt), np.int64)


@dataclass(frozen=True)
class _Chunks:
    """Grain's random-access source: unit j is the j-th run of `chunk` rows that this process reads."""

    dataset: Dataset
    rows: tuple[int, ...]
    chunk: int
    batch_size: int
    seed: int
    salt: int
    start_step: int
    flip: bool
    replace: bool

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, j: int) -> dict[str, np.ndarray]:
        step, part = divmod(j, len(self.rows) // self.chunk)
        step += self.start_step
        rows = self.rows[part * self.chunk : (part + 1) * self.chunk]
        size = self.dataset.image_size
        image = np.empty((self.chunk, size, size, 3), np.uint8)
        label = np.empty(self.chunk, np.int32)
        replaced = 0
        positions = [step * self.batch_size + row for row in rows]
        records = record_at(positions, num_records=len(self.dataset), seed=self.seed, salt=self.salt)
        mirror = self._mirrored(step)
        for slot, (row, i) in enumerate(zip(rows, records, strict=True)):
            example, skipped = self.dataset.replaced(i) if self.replace else (self.dataset[i], 0)
            image[slot] = example["image"][:, ::-1] if mirror[row] else example["image"]
            label[slot] = example["label"]
            replaced += skipped > 0
        return {"image": image, "label": label, "replaced": np.array([replaced], np.int32)}

    def _mirrored(self, step: int) -> np.ndarray:
        if not self.flip:
            return np.zeros(self.batch_size, bool)
        bits = np.random.SeedSequence((self.seed, self.salt, step), spawn_key=(_FLIP,)).generate_state(self.batch_size)
        return bits >> 31 == 1


def _join(chunks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def _start_worker(index: int, count: int) -> None:
    del index, count  # Grain passes them
    workers.die_with_parent()
    workers.ignore_signals()


def host_batches(
    dataset: Dataset,
    data: config.Data,
    *,
    rows: Sequence[int],
    seed: int,
    salt: int = 0,
    start_step: int = 0,
) -> grain.IterDataset:
    """These rows of batch start_step, start_step + 1, ..., on the host.

    Yields {"image": uint8 [b, H, W, 3], "label": int32 [b], "replaced": int32 [...] summing to the bad records replaced}.
    """
    chunk = max(n for n in range(1, _CHUNK + 1) if len(rows) % n == 0)
    source = _Chunks(
        dataset=dataset,
        rows=tuple(rows),
        chunk=chunk,
        batch_size=data.batch_size,
        seed=seed,
        salt=salt,
        start_step=start_step,
        flip=data.flip,
        replace=data.on_bad_record == "replace",
    )
    per_batch = len(rows) // chunk
    ahead = max(data.prefetch * per_batch, data.num_threads)
    read = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=ahead)
    stream = grain.MapDataset.source(source).to_iter_dataset(read)
    if data.num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags; a notebook parses none
        options = grain.MultiprocessingOptions(
            num_workers=data.num_workers, per_worker_buffer_size=max(2, data.prefetch * per_batch // data.num_workers)
        )
        shared = grain.experimental.DatasetOptions(min_shm_size=_SHARED_BYTES)
        stream = grain.experimental.WithOptionsIterDataset(stream, shared).mp_prefetch(options, worker_init_fn=_start_worker)
    return stream.batch(per_batch, batch_fn=_join)


def batches(
    dataset: Dataset,
    data: config.Data,
    *,
    mesh: jax.sharding.Mesh,
    image_size: int | tuple[int, int],
    num_classes: int,
    seed: int,
    salt: int = 0,
    start_step: int = 0,
) -> placement.Batches:
    """Global batches start_step, start_step + 1, ... placed on `mesh`, the batch over its axes of logical axis "batch".

    Args:
        image_size: what the model takes; must be the dataset's.
        num_classes: what the model takes; must be the dataset's.
        seed, salt: the order (see the top of the file); salt grows by one when a rollback must see other data.

    Raises:
        UserError: if dataset, model, batch size and mesh do not fit together.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (height, width) != (dataset.image_size, dataset.image_size):
        raise UserError(
            f"model.image_size={(height, width)} but {dataset.folder} holds {dataset.image_size}x{dataset.image_size} images"
        )
    if num_classes != dataset.num_classes:
        raise UserError(f"model.num_classes={num_classes} but {dataset.folder} has {dataset.num_classes} classes")
    if seed < 0:
        raise UserError(f"the data seed {seed} must not be negative")
    layout = NamedSharding(mesh, sharding.spec(("batch",)))
    parts = placement.count_parts(layout)
    if data.batch_size % parts:
        raise UserError(
            f"data.batch_size={data.batch_size} is not divisible by the {parts} parts that the mesh splits it into: "
            f"use a multiple of {parts}"
        )
    rows = placement.local_rows(layout, data.batch_size)
    host = host_batches(dataset, data, rows=rows, seed=seed, salt=salt, start_step=start_step)
    return placement.Batches(host, layout=layout, batch_size=data.batch_size, prefetch=data.prefetch)
