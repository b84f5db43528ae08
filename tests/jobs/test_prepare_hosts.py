"""`prepare` in several real processes that share a disk: the bytes of one, also after a kill; a mistake of one ends all."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import launching
import pytest
from faults import harness
from places import ROOT
from preparing import COUNTED_JOB, command, content, make_folder

from dip_jax.errors import Exit

pytestmark = pytest.mark.slow


class Hosts:
    """So many processes of one `prepare`."""

    def __init__(self, folder: pathlib.Path, out: str, *, count: int, last: int = 10**6, flags=(), others=()):
        script = folder / "job.py"
        script.write_text(COUNTED_JOB)
        self._logs, self.processes = [], []
        address = launching.free_address()
        for index in range(count):
            membership = (f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}")
            argv = command(folder / "images", folder / out, "--processes=1", *(membership if count > 1 else ()))[3:]
            journal = folder / f"journal-{out}-{index}"
            journal.write_bytes(b"")
            env = {"PYTHONPATH": str(ROOT), "JOURNAL": str(journal), "LAST": str(last if index else 10**6), "SHARD": "10"}
            self._logs.append(folder / f"{out}-{index}.log")
            with open(self._logs[-1], "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, script, *argv, *flags, *(others if index else ())],
                        env=os.environ | {"XLA_FLAGS": ""} | env,
                        stdout=log,
                        stderr=log,
                    )
                )

    def wait(self) -> list[int]:
        """Their exit codes."""
        return [process.wait(300) for process in self.processes]

    @property
    def logs(self) -> list[str]:
        return [log.read_text() for log in self._logs]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """80 images and one that is none: nine shards."""
    root = make_folder(tmp_path / "images", classes=("ants", "bees"), per_class=40)
    (root / "bees" / "bad.png").write_bytes(b"no image")
    return tmp_path


def start_stuck(folder: pathlib.Path) -> Hosts:
    """Two hosts, of which the second stops in its third shard, once the first has done its part and waits."""
    pair = Hosts(folder, "some", count=2, last=24)
    reports, journal = folder / "some.partial" / "reports", folder / "journal-some-1"
    end = time.monotonic() + 300
    while len(list(reports.rglob("*.json"))) < 7 or journal.stat().st_size < 25:  # five shards, and two
        assert time.monotonic() < end and [p.poll() for p in pair.processes] == [None] * 2, pair.logs
        time.sleep(0.05)
    return pair


def test_killed_and_given_again_the_bytes_are_those_of_one_host(folder):
    """The second host is killed in its third shard, when the first has done its part; two, then three go on."""
    accepted = ("--max_rejected=0.1",)
    one = Hosts(folder, "one", count=1, flags=accepted)
    assert one.wait() == [Exit.DONE], one.logs

    pair = start_stuck(folder)
    shards = folder / "some.partial" / "dataset"
    pair.processes[1].send_signal(signal.SIGKILL)
    assert pair.wait()[0] != Exit.DONE and not (folder / "some").exists(), pair.logs
    stamps = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert len(stamps) == 7

    pair = Hosts(folder, "some", count=2)
    assert pair.wait() == [Exit.REJECTED_INPUTS] * 2, pair.logs
    assert "1 of 81 images are bad" in pair.logs[0] and "process 0 stopped" in pair.logs[1]
    assert stamps.items() <= {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}.items()  # none written again

    three = Hosts(folder, "some", count=3, flags=accepted)
    assert three.wait() == [Exit.DONE] * 3, three.logs
    assert content(folder / "some") == content(folder / "one") and not (folder / "some.partial").exists()
    assert "80 train images" in three.logs[0] and not any("images" in log for log in three.logs[1:])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_told_to_stop_all_end_at_once(folder, number):
    """The first waits for the other in a collective; its writers are gone too."""
    pair = start_stuck(folder)
    writers = [pid for process in pair.processes for pid in harness.descendants(process.pid)]
    for process in pair.processes:
        process.send_signal(number)
    begin = time.monotonic()
    assert pair.wait() == [Exit.PREEMPTED] * 2, pair.logs
    assert all(f"{number.name}: stopped; give the same command again" in log for log in pair.logs)
    print(f"{number.name}: both ended after {time.monotonic() - begin:.1f} s")
    while any(map(harness.lives, writers)):
        assert time.monotonic() < begin + 60
        time.sleep(0.05)


def test_hosts_with_different_flags_end_and_a_disk_that_one_cannot_read_ends_all(folder):
    pair = Hosts(folder, "out", count=2, others=("--max_rejected=0.1",))
    assert pair.wait() == [Exit.USER_ERROR] * 2, pair.logs
    assert all("max_rejected: 0.001 in process 0, 0.1 in process 1" in log for log in pair.logs), pair.logs
    (folder / "images").rename(folder / "elsewhere")
    pair = Hosts(folder, "out", count=2)
    assert pair.wait() == [Exit.USER_ERROR] * 2, pair.logs
    assert "is not a folder" in pair.logs[0] and "process 0 stopped with an error" in pair.logs[1]
    assert not any("Traceback" in log for log in pair.logs) and not (folder / "out.partial").exists()


def test_outputs_that_are_not_one_place_end_both(nursery, folder):
    arguments = ["prepare", "--source=folder", f"--from={folder / 'images'}", "--image_size=16", "--out=out"]
    (folder / "disks").mkdir()
    children = nursery.call("command_on_own_disk", str(folder / "disks"), *arguments, count=2)
    assert [child.wait(300) for child in children] == [Exit.USER_ERROR] * 2, children[0].log + children[1].log
    assert all("is not one place: processes [1] do not see what process 0 writes there" in child.log for child in children)
    assert not list((folder / "disks" / "1").iterdir()) and not (folder / "disks" / "0" / "out").exists()
