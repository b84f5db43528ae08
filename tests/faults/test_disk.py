"""Full and read-only disks: the last good step stays, one line says what to do, and the run goes on when there is room."""

import os
import signal
import subprocess

import pytest
from faults import harness

from dip_jax.errors import Exit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root"),
]


CHANGES = {"train__steps": 30, "checkpoint__keep_last": 100, "model__width": 64, "model__num_heads": 4}


def one_line(log: str) -> str:
    assert "Traceback" not in log, log
    return log.strip().splitlines()[-1]


@pytest.mark.parametrize("blind", [False, True], ids=["space_is_checked", "space_is_not_checked"])
def test_a_full_disk_stops_the_run_and_loses_nothing(nursery, config, reference, tmp_path, blind):
    try:
        disk = harness.small_disk(tmp_path / "disk", mebibytes=14)
        with disk as folder:
            workdir = folder / "run"
            code, log = nursery.run(config, workdir, fault="blind_to_space" if blind else "")
            assert code == Exit.USER_ERROR, log
            line = one_line(log)
            print(line)
            kept = harness.steps_of(workdir)
            assert kept, log
            assert ("GiB free but needs" in line) or (f"the last good one is step {kept[-1]}" in line), line
            subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)
            code, log = nursery.run(config, workdir)
            assert code == Exit.DONE, log
            assert f"going on from step {kept[-1]} " in log
            harness.check_curve(workdir, reference)
    except subprocess.CalledProcessError:
        pytest.skip("this machine does not let us mount")


def test_a_read_only_disk_is_one_line(nursery, config, reference, tmp_path):
    try:
        with harness.small_disk(tmp_path / "disk", mebibytes=200) as folder:
            workdir = folder / "run"
            child = nursery.start(config, workdir, fault="slow_steps")
            child.wait_for(lambda: len(harness.steps_of(workdir)) >= 2)
            child.send(signal.SIGTERM)
            assert child.wait() == Exit.PREEMPTED
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            code, log = nursery.run(config, workdir)
            assert code == Exit.USER_ERROR, log
            assert "cannot be written" in one_line(log)
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
            assert nursery.run(config, workdir)[0] == Exit.DONE
            harness.check_curve(workdir, reference)
    except subprocess.CalledProcessError:
        pytest.skip("this machine does not let us mount")
