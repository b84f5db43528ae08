"""What lives in a bucket: lock, manifest, commit, table, on an in-memory store that cannot rename or append."""

import importlib
import time

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from dip_jax.checkpoints import directories, manifest
from dip_jax.errors import UserError
from dip_jax.jobs import status
from dip_jax.runtime import goodput, writers
from dip_jax.runtime.lock import Lock, _Lease


class Store(MemoryFileSystem):
    """An object store: whole objects in, whole objects out."""

    protocol = ("gs",)
    store: dict = {}  # noqa: RUF012 (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    def mv(self, *args, **kwargs):
        raise AssertionError("a bucket cannot rename")

    move = rename = mv

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode, "a bucket cannot append"
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def root(monkeypatch):
    backend = importlib.import_module("etils.epath.backend")
    gpath = importlib.import_module("etils.epath.gpath")
    Store.store.clear()
    fsspec.register_implementation("gs", Store, clobber=True)
    own = backend._FileSystemSpecBackend()
    monkeypatch.setattr(own, "_get_filesystem", lambda *args: Store())
    monkeypatch.setattr(gpath.PosixGPath, "_backend", own)
    return epath.Path("gs://bucket/run/checkpoints")


def write_step(root, number, *, committed=True):
    for name in ("state/data", "ema/data", "config/metadata"):
        (root / str(number) / name).write_text(f"{number} {name}")
    if committed:
        manifest.write_manifest(root / str(number))
        (root / str(number) / manifest.COMMIT).write_text("")


def test_a_step_counts_once_it_is_committed(root):
    write_step(root, 2)
    write_step(root, 4, committed=False)
    assert directories.complete(root) == [2]
    assert manifest.damage(root / "2") is None
    directories.clean(root)
    assert not (root / "4").exists()
    assert directories.complete(root) == [2]


def test_what_a_tool_copied_from_a_disk_counts_without_the_marker(root):
    """Orbax writes the marker on disks since its newest releases only, and some tools leave out what they do not know."""
    write_step(root, 2)
    (root / "2" / manifest.COMMIT).unlink()
    (root / "2" / "ema" / manifest.COMMIT).write_text("another tool's")
    assert directories.complete(root) == [2] and manifest.damage(root / "2") is None
    directories._delete(root, 2)
    assert directories.complete(root) == []


def test_damage_is_copied_aside(root):
    write_step(root, 2)
    write_step(root, 4)
    (root / "4" / "ema" / "data").write_text("flipped")
    assert "ema/data is not what was written" in manifest.damage(root / "4")
    found = []
    assert (
        directories.newest(root, verify=True, on_damage=lambda step, fault: found.append(directories.set_aside(root, step)))
        == 2
    )
    assert [path.name for path in found] == ["4"]
    assert (root / "damaged" / "4" / "ema" / "data").read_text() == "flipped"
    assert directories.complete(root) == [2]


def test_old_steps_are_withdrawn_before_they_are_deleted(root, monkeypatch):
    for number in (1, 2, 3):
        write_step(root, number)
    seen = []
    original = Store.rm

    def rm(self, path, recursive=False, maxdepth=None):
        if recursive:
            seen.append(directories.complete(root))
        return original(self, path, recursive=recursive, maxdepth=maxdepth)

    monkeypatch.setattr(Store, "rm", rm)
    directories.prune(root, keep_last=1, keep_every=2)
    assert directories.complete(root) == [2, 3]
    assert all(1 not in complete for complete in seen)


def test_tables_grow_without_append(root):
    for resume, numbers in ((0, (1, 2, 3)), (2, (3, 4))):
        table = writers.Table(root / "metrics", resume_step=resume)
        for number in numbers:
            table.add({"step": number, "loss": 1 / number})
    assert [row["step"] for row in writers.read_rows(root / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len((root / "metrics.csv").read_text().splitlines()) == 5


def test_a_renewed_lock_is_refused_and_a_dead_one_taken_over(root, monkeypatch):
    monkeypatch.setattr(_Lease, "RENEW", 0.05)
    monkeypatch.setattr(_Lease, "FREE", 0.5)
    holder = Lock(root)
    holder.acquire()
    with pytest.raises(UserError, match="in use by process"):
        Lock(root).acquire()
    holder._lease._ended.set()  # the holder dies without a word
    heir = Lock(root)
    heir.acquire()
    heir.release()
    again = Lock(root)
    again.acquire()
    again.release()


def test_hours_and_status_of_a_run_in_a_bucket(root, monkeypatch):
    monkeypatch.setattr(goodput, "_period", lambda local: 0.05)
    workdir = root.parent
    (workdir / "config.json").write_text('{"train": {"steps": 9}}')
    table = writers.Table(workdir / "metrics", resume_step=0)
    with goodput.recording(workdir, began=time.monotonic()) as ledger:
        ledger.at(2, compiling=False)
        time.sleep(0.3)
        write_step(root, 2)
        table.add({"step": 2, "loss": 0.5, **ledger.shares()})
        facts = status.describe(workdir, verify=True)
        assert (facts["state"], facts["step"], facts["last"]) == ("going on", 2, {"loss": 0.5})
        assert facts["seconds"]["steps"] > 0.2
    facts = status.describe(workdir, verify=True)
    assert [(row["checkpoint"], row["hashes"]) for row in facts["checkpoints"]] == [("2", "as it was written")]
    assert (facts["state"], facts["starts"][0]["exit"]) == ("ended with exit code 0", "0")
