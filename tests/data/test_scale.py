"""A million records: nothing may grow with their number but the index."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from places import ROOT
from small_data import write_dataset

RECORDS, BATCH = 1_280_000, 256

# A process of its own: what other tests hold and free is not what the pipeline does.
READER = f"""
import itertools, json, pathlib, resource, sys, time
from absl import flags
flags.FLAGS.mark_as_parsed()
from dip_jax import config
from dip_jax.data import prepared
from dip_jax.data import order
from dip_jax.data import pipeline

folder, start_step, batches = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
began = time.perf_counter()
dataset = prepared.open_dataset(folder)
data = config.Data(batch_size={BATCH})
stream = iter(pipeline.host_batches(dataset, data, rows=range({BATCH}), seed=1, start_step=start_step))
first = next(stream)
seconds = time.perf_counter() - began
memory = []
for k in range(1, batches):
    next(stream)
    if k % (batches // 20) == 0:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * resource.getpagesize() / 2**20)
stream.close()
read = [int.from_bytes(image.tobytes(), "little") for image in first["image"]]
planned = order.batch_indices({RECORDS}, batch_size={BATCH}, seed=1, step=start_step).tolist()
print(json.dumps({{"seconds": seconds, "as_planned": read == planned, "memory": memory}}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("scale"),
        RECORDS,
        size=2,
        classes=10,
        per_shard=2048,
        record=lambda i: (i % 10, i.to_bytes(12, "little")),
    ).folder


def check(folder: pathlib.Path, *, start_step: int, batches: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", READER, str(folder), str(start_step), str(batches)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(found)
    assert found["seconds"] < 10 and found["as_planned"]
    memory = found["memory"]  # MiB, at every twentieth of the way; the first twentieth opens the shards
    assert max(memory) - memory[0] < 3, memory


@pytest.mark.slow
@pytest.mark.parametrize("start_step", [0, 700_000])
def test_a_million_records_start_at_once_and_stay_small(folder, start_step):
    check(folder, start_step=start_step, batches=1_000)


@pytest.mark.campaign
def test_memory_is_flat_over_ten_thousand_batches(folder):
    check(folder, start_step=700_000, batches=10_000)
