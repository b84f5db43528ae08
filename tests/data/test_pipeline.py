"""Datasets that are opened, records that are bad, batches that land on devices."""

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from small_data import number_of, pixels_of, write_dataset

from dip_jax import config
from dip_jax.data import order, pipeline, placement, prepared
from dip_jax.errors import UserError
from dip_jax.runtime import sharding

COUNT = 23


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pipeline") / "data", COUNT)


@pytest.fixture
def damaged(tmp_path):
    """Records 4 and 5 have a label out of range and too few pixels."""

    def record(i):
        return (99 if i == 4 else -1 if i == 12 else i % 5), (b"short" if i == 5 else pixels_of(i, 4).tobytes())

    return write_dataset(tmp_path / "damaged", COUNT, record=record)


def test_random_access(dataset):
    assert (len(dataset), dataset.num_classes, dataset.image_size) == (COUNT, 5, 4)
    for i in (0, 6, 7, COUNT - 1):
        example = dataset[i]
        assert example["image"].dtype == np.uint8 and example["image"].shape == (4, 4, 3)
        assert (number_of(example["image"]), example["label"]) == (i, i % 5)
    for i in (-1, COUNT):
        with pytest.raises(IndexError):
            dataset[i]


def test_no_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"prepare --source=photo_crops --out=.*nothing"):
        prepared.open_dataset(tmp_path / "nothing", source="photo_crops")
    with pytest.raises(UserError, match=r"prepare --source=folder --from=DIR --image_size=N --out="):
        prepared.open_dataset("")
    (tmp_path / "photographs" / "cats").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no dataset at (.*photographs): .* --from=\1 --image_size=N --out=DATASET_DIR"):
        prepared.open_dataset(tmp_path / "photographs")  # never onto itself
    with pytest.raises(UserError, match="mount the bucket"):
        prepared.open_dataset("gs://bucket/data")


def test_the_train_split_is_opened(tmp_path):
    write_dataset(tmp_path / "data" / "train", 3)
    write_dataset(tmp_path / "data" / "validation", 2)
    assert len(prepared.open_dataset(tmp_path / "data")) == 3
    assert len(prepared.open_dataset(tmp_path / "data" / "validation")) == 2


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_damaged_directory_is_one_line(tmp_path):
    def fresh(name):
        return write_dataset(tmp_path / name, COUNT).folder

    folder = fresh("missing")
    (folder / "train-00001-of-00004.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00004.array_record is missing"):
        prepared.open_dataset(folder)
    folder = fresh("short")
    os.truncate(folder / "train-00002-of-00004.array_record", 100)
    with pytest.raises(UserError, match=r"train-00002.* is 100 bytes long"):
        prepared.open_dataset(folder)
    folder = fresh("edited")
    edit(folder / "dataset.json", classes=["a"] * 5)
    with pytest.raises(UserError, match="was changed"):
        prepared.open_dataset(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        prepared.open_dataset(folder)
    with pytest.raises(UserError, match=r"4x4 images where 8x8"):
        prepared.open_dataset(fresh("size"), image_size=8)


@pytest.mark.parametrize("i, reason", [(4, r"label 99 is outside \[0, 5\)"), (12, "label -1"), (5, "5 bytes are not")])
def test_a_bad_record_names_shard_and_record(damaged, i, reason):
    with pytest.raises(prepared.BadRecordError, match=rf"train-0000{i // 7}-of-00004.array_record record {i % 7}: .*{reason}"):
        damaged[i]


def test_a_flipped_byte_names_shard_and_record(tmp_path):
    dataset = write_dataset(tmp_path / "flipped", COUNT, size=16)
    path = dataset.folder / dataset.info.shards[1].file
    data = bytearray(path.read_bytes())
    start = data.find(pixels_of(9, 16).tobytes())
    data[start + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(prepared.BadRecordError, match=r"train-00001-of-00004.array_record record 2"):
        prepared.open_dataset(dataset.folder)[9]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_record_stops_training_by_default(damaged, workers):
    section = config.Data(batch_size=COUNT, num_threads=2, num_workers=workers)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    batches = pipeline.batches(damaged, section, mesh=mesh, image_size=4, num_classes=5, seed=0)
    with pytest.raises(UserError, match=r"train-.* record \d"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_can_be_replaced_without_a_shift(damaged, workers):
    section = config.Data(batch_size=COUNT, num_threads=2, num_workers=workers, on_bad_record="replace")
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    batches = pipeline.batches(damaged, section, mesh=mesh, image_size=4, num_classes=5, seed=0)
    neighbour = {4: 6, 5: 6, 12: 13}
    for step in range(3):
        batch = next(batches)
        planned = order.batch_indices(COUNT, batch_size=COUNT, seed=0, step=step)
        found = [number_of(image) for image in np.asarray(batch["image"])]
        assert found == [neighbour.get(i, i) for i in planned]
        assert np.asarray(batch["label"]).tolist() == [i % 5 for i in found]
        assert batches.replaced == 3 * (step + 1)
    batches.close()


MESHES = [config.Mesh(), config.Mesh(data=2, fsdp=4), config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=1, tensor=8)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_batches_land_on_every_mesh(dataset, sizes):
    mesh = sharding.make_mesh(sizes)
    batches = pipeline.batches(
        dataset, config.Data(batch_size=16, num_threads=2), mesh=mesh, image_size=(4, 4), num_classes=5, seed=2, start_step=3
    )
    for step in (3, 4):
        batch = next(batches)
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        wanted = jax.sharding.NamedSharding(mesh, sharding.spec(("batch",)))
        for value in batch.values():
            assert value.sharding.is_equivalent_to(wanted, value.ndim)
        found = [number_of(image) for image in np.asarray(batch["image"])]
        assert found == order.batch_indices(COUNT, batch_size=16, seed=2, step=step).tolist()
        assert np.asarray(batch["label"]).tolist() == [i % 5 for i in found]
    batches.close()


class HalfOfTheDevices(jax.sharding.NamedSharding):
    """A layout as one of two processes sees it: its own devices are addressable, the others are not."""

    def addressable_devices_indices_map(self, shape):
        own = np.split(np.array(jax.devices()), 2)[self.half]
        return {device: index for device, index in self.devices_indices_map(shape).items() if device in own}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_process_reads_the_rows_of_its_devices(sizes):
    rows = []
    for half in (0, 1):
        layout = HalfOfTheDevices(sharding.make_mesh(sizes), sharding.spec(("batch",)))
        layout.half = half
        rows.append(placement.local_rows(layout, 16))
    assert sorted({*rows[0], *rows[1]}) == list(range(16))
    if sizes.tensor == 8:  # the batch is whole on every device: both processes read all of it
        assert rows[0] == rows[1] == list(range(16))
    else:
        assert not set(rows[0]) & set(rows[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 8}, r"model.image_size=\(8, 8\) but .* 4x4"),
        ({"image_size": (4, 8)}, r"model.image_size=\(4, 8\) but"),
        ({"num_classes": 1000}, r"model.num_classes=1000 but .* 5 classes"),
        ({"seed": -1}, "seed -1"),
        ({"data": config.Data(batch_size=12)}, r"data.batch_size=12 is not divisible by the 8 parts"),
    ],
)
def test_what_does_not_fit_together_is_one_line(dataset, change, message):
    arguments = {"data": config.Data(batch_size=16), "image_size": 4, "num_classes": 5, "seed": 0} | change
    with pytest.raises(UserError, match=message):
        pipeline.batches(dataset, arguments.pop("data"), mesh=sharding.make_mesh(config.Mesh()), **arguments)


PARENT = """
    import sys
    from absl import flags
    from dip_jax import config
    from dip_jax.data import pipeline, prepared

    if __name__ == "__main__":
        flags.FLAGS.mark_as_parsed()
        data = config.Data(batch_size=4, num_workers=2, num_threads=1)
        stream = iter(pipeline.host_batches(prepared.open_dataset(sys.argv[1]), data, rows=range(4), seed=0))
        next(stream)
        print("reading", flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_die_with_a_killed_parent(dataset, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(
        [sys.executable, script, dataset.folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert parent.stdout.readline() == b"reading\n"
    workers = [int(pid) for task in os.listdir(f"/proc/{parent.pid}/task") for pid in children(parent.pid, task)]
    assert len(workers) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for pipe in (parent.stdin, parent.stdout):
        pipe.close()
    deadline = time.monotonic() + 10
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def test_signals_meant_for_the_trainer_leave_its_workers_reading(dataset, monkeypatch):
    join, kinds = pipeline._join, set()

    def watched(chunks):
        kinds.update(type(array) for chunk in chunks for array in chunk.values())
        return join(chunks)

    monkeypatch.setattr(pipeline, "_join", watched)
    data = config.Data(batch_size=4, num_workers=2, num_threads=1)
    stream = iter(pipeline.host_batches(dataset, data, rows=range(4), seed=0))
    for _ in range(4):  # until both workers have started and read
        next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    for step in range(4, 20):
        found = [number_of(image) for image in next(stream)["image"]]
        assert found == order.batch_indices(COUNT, batch_size=4, seed=0, step=step).tolist()
    stream.close()
    assert not any(worker.is_alive() for worker in workers)
    assert kinds == {np.ndarray}  # small arrays do not pass through shared memory


def children(pid: int, task: str) -> list[str]:
    return pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split()


def runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
