"""`prepare`, killed and started again, and started twice."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from faults import harness
from places import ROOT
from preparing import COUNTED_JOB, command, content, make_folder
from source_files import CLASSES, WRITERS, generate

from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.jobs.prepare import prepare
from dip_jax.runtime import distributed


def start_counted(
    root: pathlib.Path, out: pathlib.Path, *, journal: pathlib.Path, last: int, source: str = "folder"
) -> subprocess.Popen:
    script = journal.with_name("job.py")
    script.write_text(COUNTED_JOB)
    journal.write_bytes(b"")
    return subprocess.Popen(
        [sys.executable, script, *command(root, out, "--processes=2", "--max_rejected=0.1", source=source)[3:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JOURNAL": str(journal), "LAST": str(last), "SHARD": "20"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def kill_and_go_on(tmp_path, source: str, *, kills: int, images: int, seed: int) -> None:
    """Kills `prepare` after random numbers of images; the result must be the uninterrupted one, to the byte."""
    files = sorted([*generate(images, size=(120, 90)), (CLASSES[1], "bad.png", b"no image")])
    root = WRITERS[source](files, tmp_path / "images")
    journal, images_in_all, out = tmp_path / "journal", images + 1, tmp_path / "out"
    whole = start_counted(root, tmp_path / "whole", journal=journal, last=images_in_all, source=source)
    _, error = whole.communicate()
    assert whole.returncode == 0 and journal.stat().st_size == images_in_all, error.decode()
    rng = random.Random(seed)
    for kills_left in range(kills, 0, -1):
        finished = len(list((tmp_path / "out.partial").glob("reports/*/*.json")))
        share = (images_in_all - 20 * finished) // (kills_left + 1)
        moment = rng.randint(1, share)
        last = share + share // 2  # and no further, however fast it is
        job = start_counted(root, out, journal=journal, last=last, source=source)
        while journal.stat().st_size < moment:
            assert job.poll() is None, f"ended after {journal.stat().st_size} of {moment} images: {job.stderr.read().decode()}"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        job.kill()
        job.communicate()
        assert job.returncode == -signal.SIGKILL and not out.exists()
    job = start_counted(root, out, journal=journal, last=images_in_all, source=source)
    _, error = job.communicate()
    assert job.returncode == 0, error.decode()
    assert journal.stat().st_size < images_in_all, "no finished shard outlived the kills"
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("source", ["folder", *(pytest.param(s, marks=pytest.mark.slow) for s in WRITERS if s != "folder")])
def test_a_kill_costs_nothing_but_time(tmp_path, source):
    kill_and_go_on(tmp_path, source, kills=2, images=300, seed=0)


@pytest.mark.campaign
def test_ten_kills_cost_nothing_but_time(tmp_path):
    kill_and_go_on(tmp_path, "folder", kills=10, images=2100, seed=1)


def test_a_second_prepare_refuses(tmp_path):
    root = make_folder(tmp_path / "images", per_class=100, size=(300, 200))
    first = subprocess.Popen(command(root, tmp_path / "out"), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    lock = tmp_path / "out.partial" / "lock"
    while not lock.exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it holds the lock and goes no further, however busy the machine is
    with pytest.raises(UserError, match="being written by another prepare: wait for it, or choose another --out"):
        prepare("folder", root=str(root), image_size=48, out=tmp_path / "out")
    prepare("folder", root=str(make_folder(tmp_path / "few", per_class=1)), image_size=48, out=tmp_path / "another")
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == Exit.INTERRUPTED
    assert not (tmp_path / "out").exists()
    prepare("folder", root=str(root), image_size=48, out=tmp_path / "out")


def test_ctrl_c_before_the_work_says_what_it_says_during_it(tmp_path, monkeypatch):
    root, out = make_folder(tmp_path / "images", per_class=1), tmp_path / "out"

    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="the same command goes on") as stopped:
        patch.setattr(distributed, "require_shared", interrupt)  # the lock is held, no image is read
        prepare("folder", root=str(root), image_size=48, out=out)
    assert stopped.value.code == Exit.INTERRUPTED and not out.exists()
    prepare("folder", root=str(root), image_size=48, out=out)


def test_a_writer_that_is_killed_leaves_work_that_fewer_finish(tmp_path):
    root = make_folder(tmp_path / "images", per_class=100, size=(300, 200))
    ask = command(root, tmp_path / "out", "--processes=2")
    first = subprocess.Popen(ask, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not [child for child in harness.descendants(first.pid) if is_writer(child)]:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(next(child for child in harness.descendants(first.pid) if is_writer(child)), signal.SIGKILL)
    assert "a writing process was killed (out of memory?): use fewer --processes and run it again" in first.communicate()[1]
    assert first.returncode == Exit.USER_ERROR
    assert subprocess.run([*ask, "--processes=1"], cwd=ROOT).returncode == 0 and (tmp_path / "out").exists()


def is_writer(pid: int) -> bool:
    """Whether a process is one of a pool's that write, not the one that keeps account of their semaphores."""
    with contextlib.suppress(OSError):
        return b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_a_signal_to_the_whole_job_is_told_as_one_also_where_the_writers_hear_it_first(tmp_path):
    root = make_folder(tmp_path / "images", per_class=10)
    job = start_counted(root, tmp_path / "out", journal=tmp_path / "journal", last=5)
    while (tmp_path / "journal").stat().st_size < 5:
        assert job.poll() is None, job.stderr.read().decode()
        time.sleep(0.01)
    children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for child in map(int, children):
        with contextlib.suppress(ProcessLookupError):  # the pool ends the others when it misses one
            os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=20)
    assert job.returncode == Exit.PREEMPTED and "give the same command again" in error.decode()
