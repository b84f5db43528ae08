"""A million records: nothing may grow with their number but the index."""

import pathlib
import resource
import time

import pytest
from small_data import write_dataset

from dip_jax import config
from dip_jax.data import pipeline

RECORDS, BATCH = 1_280_000, 256


def resident_mib() -> float:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_a_million_records_start_at_once_and_stay_small(tmp_path):
    folder = write_dataset(
        tmp_path / "data", RECORDS, size=2, classes=10, per_shard=2048, record=lambda i: (i % 10, i.to_bytes(12, "little"))
    ).folder
    for start_step in (0, 700_000):
        began = time.perf_counter()
        dataset = pipeline.open_dataset(folder)
        stream = iter(
            pipeline.host_batches(dataset, config.Data(batch_size=BATCH), rows=range(BATCH), seed=1, start_step=start_step)
        )
        batch = next(stream)
        assert time.perf_counter() - began < 10
        planned = pipeline.batch_indices(RECORDS, batch_size=BATCH, seed=1, step=start_step)
        assert [int.from_bytes(image.tobytes(), "little") for image in batch["image"]] == planned.tolist()
        memory = []
        for k in range(400):
            next(stream)
            memory.append(resident_mib()) if k % 100 == 99 else None
        stream.close()
        assert memory[-1] - memory[0] < 50, memory  # other tests' leftovers in this process move by tens
