"""200 steps with a kill, a slow dataset, slow saves, evaluations, a profile: the table of hours against what was injected."""

import re
import signal
import time
from collections import Counter

import pytest
from etils import epath
from faults import harness

from dip_jax.errors import Exit
from dip_jax.runtime import goodput, writers

CHANGES = {"train__steps": 200, "train__eval_every": 100, "checkpoint__every_steps": 50, "eval__num_samples": 9}
PROFILED = {"train__profile_steps": (120, 125)}
STOPPED = 20.0


def injected(log: str) -> Counter:
    found: Counter = Counter()
    for part, seconds in re.findall(r"^injected (\w+) ([\d.]+)$", log, flags=re.MULTILINE):
        found[part] += float(seconds)
    return found


@pytest.mark.slow
def test_the_table_is_what_was_injected(nursery, changed, dataset, tmp_path):
    config, workdir = changed(eval__reference=str(dataset), **PROFILED), tmp_path / "run"
    first = nursery.start(config, workdir, fault="known_times")
    began = time.time()  # the nursery may have had to import first
    first.wait_for(lambda: len(harness.curve(workdir)) >= 130)
    first.send(signal.SIGKILL)
    killed = time.time()
    assert first.wait() == -signal.SIGKILL
    time.sleep(STOPPED)
    second = nursery.start(config, workdir, fault="known_times")
    assert second.wait() == Exit.DONE, second.log
    wall = time.time() - began
    one, two = goodput.read_starts(epath.Path(workdir))
    found = goodput.divide([one, two])
    expected = injected(first.log) + injected(second.log)
    done_twice = one.step - two.origin - 1  # the first of them was compiled and counts there
    expected["again"] = done_twice * injected(second.log)["steps"] / (two.step - two.origin - 1)
    expected["steps"] -= expected["again"]
    expected["stopped"] = two.began - killed
    print(f"\nbefore {one.began - began:.2f} s, behind {began + wall - two.last:.2f} s")
    print(f"wall {wall:.1f} s, in the table {sum(found.values()):.1f} s")
    for part, seconds in found.items():
        print(f"{part:10} injected {expected[part]:6.1f} s, found {seconds:6.1f} s")
    assert sum(found.values()) == pytest.approx(wall, rel=0.01)
    assert (one.exit, two.exit, two.origin, two.step) == (
        None,
        Exit.DONE,
        100,
        200,
    ) and one.step >= 120  # at most a second of them is forgotten
    for part in ("steps", "data", "saving", "showing", "profiling", "again", "stopped"):
        assert found[part] == pytest.approx(expected[part], rel=0.1), part
    assert found["start_up"] >= expected["start_up"] >= 4
    row = writers.read_rows(workdir / "metrics.jsonl")[-1]
    assert row["goodput"] * row["wall_seconds"] == pytest.approx(found["steps"], rel=0.02)  # the last save came behind it
