"""From a prepared dataset to batches on the devices, in the order of `data/order.py`.

A process reads only the rows of a batch that its own devices hold. Grain reads: chunks of rows in parallel, by threads or by
worker processes, delivered in order; one more thread places finished batches on the devices ahead of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from dip_jax import config
from dip_jax.data import placement, workers
from dip_jax.data.order import record_at
from dip_jax.data.prepared import Dataset
from dip_jax.errors import UserError
from dip_jax.runtime import sharding

_CHUNK = 16  # most rows per unit of reading: enough to make Grain's cost per unit vanish, few enough to balance threads
_ENDLESS = 1 << 60  # units in the stream; the iterator has no end
_SHARED_BYTES = 1 << 16  # smaller arrays go from process to process through a pipe, which costs less than shared memory
_FLIP = 1  # stream number beside the order's, under the same seed


@dataclass(frozen=True)
class _Chunks:
    """Grain's random-access source: unit j is the j-th run of `chunk` rows that this process reads."""

    dataset: Dataset
    rows: tuple[int, ...]
    chunk: int
    batch_size: int
    seed: int
    salt: int
    offset: int
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
        positions = [self.offset + step * self.batch_size + row for row in rows]
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
    offset: int = 0,
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
        offset=offset,
        start_step=start_step,
        flip=data.flip,
        replace=data.on_bad_record == "replace",
    )
    per_batch = len(rows) // chunk
    ahead = max(data.prefetch * per_batch, data.num_threads)
    read = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=ahead)
    stream = grain.MapDataset.source(source).to_iter_dataset(read)
    if data.num_workers:
        workers.end_if_unguarded()
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
    offset: int = 0,
    start_step: int = 0,
) -> placement.Batches:
    """Global batches start_step, start_step + 1, ... placed on `mesh`, the batch over its axes of logical axis "batch".

    Args:
        image_size: what the model takes; must be the dataset's.
        num_classes: what the model takes; must be the dataset's.
        seed, salt, offset: see the top of `data/order.py`; salt grows by one when a rollback must see other data.

    Raises:
        UserError: if dataset, model, batch size and mesh do not fit together.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (height, width) != (dataset.image_size, dataset.image_size):
        raise UserError(
            f"model.image_size={(height, width)} but {dataset.folder} holds {dataset.image_size}x{dataset.image_size} images"
        )
    if num_classes != dataset.num_classes:
        raise UserError(
            f"model.num_classes={num_classes} but {dataset.folder} has {dataset.num_classes} classes: "
            f"set --config.model.num_classes={dataset.num_classes}, or 0 for as many as the dataset has"
        )
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
    host = host_batches(dataset, data, rows=rows, seed=seed, salt=salt, offset=offset, start_step=start_step)
    return placement.Batches(host, layout=layout, batch_size=data.batch_size, prefetch=data.prefetch)
