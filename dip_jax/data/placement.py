"""Host batches -> global arrays on the devices, ahead of the step."""

import weakref
from collections.abc import Iterator

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import NamedSharding

from dip_jax.data import workers
from dip_jax.errors import UserError


def local_rows(layout: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that devices of this process hold, each once, ascending."""
    slices = layout.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in slices for row in range(*rows.indices(batch_size))})


def count_parts(layout: NamedSharding) -> int:
    """The number of different slices that the layout cuts a batch into."""
    slices = layout.devices_indices_map((layout.num_devices,)).values()
    return len({rows.indices(layout.num_devices) for (rows,) in slices})


class Batches(Iterator[dict[str, jax.Array]]):
    """Endless device-placed batches {"image": uint8 [B, H, W, 3], "label": int32 [B]}, placed by a thread of its own.

    Args:
        host: yields this process's rows ({"image", "label"}) and "replaced", numbers of bad records that were replaced.
        layout: how a batch lies on the devices, by its first axis.
        prefetch: batches on the devices ahead of the one handed out.

    Attributes:
        replaced: bad records that were replaced so far, in the batches handed out by this process.
    """

    def __init__(self, host: grain.IterDataset, *, layout: NamedSharding, batch_size: int, prefetch: int):
        self.replaced = 0
        self._layout, self._batch_size = layout, batch_size
        self._slot = {row: slot for slot, row in enumerate(local_rows(layout, batch_size))}
        self._iterator = iter(ThreadPrefetchIterDataset(host.map(self._place), prefetch_buffer_size=prefetch))
        self._close = weakref.finalize(self, self._iterator.close)  # also at exit, while Grain can still do it

    def _place(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], int]:
        return {key: self._put(batch[key]) for key in ("image", "label")}, int(batch["replaced"].sum())

    def _put(self, local: np.ndarray) -> jax.Array:
        def rows_of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch_size)
            return local[self._slot[start] : self._slot[start] + stop - start]

        return jax.make_array_from_callback((self._batch_size, *local.shape[1:]), self._layout, rows_of_device)

    def __next__(self) -> dict[str, jax.Array]:
        try:
            batch, replaced = next(self._iterator)
        except RuntimeError as error:  # how Grain tells of a worker that ended
            if f"exit code {workers.UNGUARDED}" in str(error):
                raise UserError(workers.GUARD) from None
            raise
        self.replaced += replaced
        return batch

    def close(self) -> None:
        """Ends the threads and workers; the iterator is of no use afterwards."""
        self._close()
