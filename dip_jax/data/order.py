"""Which image comes when: a function of (seed, salt, step), not of iterator state.

stream    epoch 0, epoch 1, ... one after the other; each a permutation of all records, seeded by (seed, salt, epoch)
batch k   stream[offset + k * batch_size : offset + (k + 1) * batch_size], whatever the number of hosts, workers or threads

The offset is 0 until the batch size changes: a run that goes on from step k with another one begins where batch k would have.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from dip_jax.data.prepared import Dataset
from dip_jax.errors import UserError


def identity(dataset: Dataset, *, seed: int, batch_size: int, salt: int = 0, offset: int = 0) -> dict[str, Any]:
    """All that decides which images batch k holds, as JSON values: what a checkpoint stores beside the step."""
    return {"fingerprint": dataset.fingerprint, "seed": seed, "salt": salt, "batch_size": batch_size, "offset": offset}


def find_offset(saved: Mapping[str, Any], *, step: int, batch_size: int) -> int:
    """The offset, in images, with which batches of this size go on where the checkpoint of `step` stands in the stream."""
    return saved.get("offset", 0) + step * (saved["batch_size"] - batch_size)


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with a data order that no other batch size could make of a checkpoint's.

    Raises:
        UserError: naming what differs, with both values.
    """
    for key in ("fingerprint", "seed", "salt"):
        if saved.get(key) != now[key]:
            raise UserError(
                f"the checkpoint was trained with data {key}={saved.get(key)} but this run has {key}={now[key]}: "
                "use the same data and seed, or start in another workdir"
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


def batch_indices(num_records: int, *, batch_size: int, seed: int, salt: int = 0, offset: int = 0, step: int) -> np.ndarray:
    """The record indices of global batch `step`, int64 [batch_size]."""
    positions = range(offset + step * batch_size, offset + (step + 1) * batch_size)
    return np.array(record_at(positions, num_records=num_records, seed=seed, salt=salt), np.int64)
