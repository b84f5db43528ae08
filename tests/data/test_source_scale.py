"""ImageNet's number of rows as parquet: prepared with flat memory, at work at once, also when it goes on."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
from pictures import encoded
from PIL import Image
from places import ROOT
from preparing import command
from pyarrow import parquet

ROWS, FILES, GROUP = 1_280_000, 64, 1000


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> pathlib.Path:
    """As many rows as ImageNet has, each a PNG of 2x2 pixels."""
    folder = tmp_path_factory.mktemp("rows")
    images = [encoded(Image.fromarray(np.full((2, 2, 3), k, np.uint8)), "PNG") for k in range(256)]
    names = [f"class {k}" for k in range(1000)]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    kinds = {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "label": pyarrow.int64()}
    schema = pyarrow.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    each = ROWS // FILES
    for number in range(FILES):
        records = range(number * each, (number + 1) * each)
        values = {
            "image": [{"bytes": images[i % 256], "path": None} for i in records],
            "label": [i % 1000 for i in records],
        }
        path = folder / f"train-{number:05d}-of-{FILES:05d}.parquet"
        parquet.write_table(pyarrow.table(values, schema=schema), path, row_group_size=GROUP)
    return folder


def resident_mib(pid: int) -> float:
    """Memory of a process and its children now, without what they share."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = 0
    for one in (pid, *map(int, children)):
        size, resident, shared, *_ = pathlib.Path(f"/proc/{one}/statm").read_text().split()
        pages += int(resident) - int(shared)
    return pages * resource.getpagesize() / 2**20


def run(rows: pathlib.Path, out: pathlib.Path, *, until: int) -> tuple[float, list[float]]:
    """Seconds to the first new shard, and memory at each shard from then on, until so many are there (and is then killed)."""
    began, first, memory = time.monotonic(), None, []
    shards = out.with_name(f"{out.name}.partial") / "dataset"
    before = seen = len(list(shards.glob("*.array_record")))
    argv = command(rows, out, "--processes=2", "--encoding=raw", source="parquet")
    job = subprocess.Popen(
        [word for word in argv if "image_size" not in word] + ["--image_size=2"], cwd=ROOT, env={**os.environ}
    )
    while job.poll() is None and seen < until:
        found = len(list(shards.glob("*.array_record"))) if shards.exists() else 0
        if found > seen:
            first = first or time.monotonic() - began
            seen = found
            memory.append(resident_mib(job.pid))
        time.sleep(0.02)
    assert seen > before, "it ended before it wrote anything"
    job.send_signal(signal.SIGKILL)
    job.wait()
    return first, memory


@pytest.mark.campaign
def test_a_million_rows_start_at_once_go_on_at_once_and_stay_small(rows, tmp_path):
    out = tmp_path / "out"
    start, memory = run(rows, out, until=60)
    resume, later = run(rows, out, until=120)
    print({"start_seconds": start, "resume_seconds": resume, "mib": memory, "mib_after": later}, file=sys.stderr)
    assert start < 10 and resume < 10
    for part in (memory, later):
        assert max(part[len(part) // 2 :]) - max(part[5 : len(part) // 2]) < 10, part  # the last half holds no more
