"""Interrupted runs end with the same curve, bit for bit, as one that nobody interrupted: real processes, real signals."""

import signal

import pytest

from dip_jax.errors import Exit
from faults import harness

STEPS = 10
CHANGES = {"train__steps": STEPS}

MESHES = [{"mesh__data": 1, "mesh__fsdp": 2}, {"mesh__data": 1, "mesh__tensor": 2}, {"mesh__zero1": True}]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, Exit.PREEMPTED),
        pytest.param(signal.SIGUSR1, Exit.PREEMPTED, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, Exit.INTERRUPTED, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_curve_joins_up(nursery, config, reference, tmp_path, number, code):
    workdir = tmp_path / "run"
    child = nursery.start(config, workdir, fault="slow_steps")
    child.wait_for(lambda: len(harness.curve(workdir)) >= 5)
    child.send(number)
    assert child.wait() == code, child.log
    if number != signal.SIGKILL:
        assert "run the same command again to go on" in child.log
        assert f"saved step {harness.steps_of(workdir)[-1]}" in child.log
    code, log = nursery.run(config, workdir)
    assert code == Exit.DONE, log
    assert "going on from step" in log
    harness.check_curve(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_another_mesh_goes_on_with_the_same_batches(nursery, changed, reference, tmp_path, mesh):
    workdir = tmp_path / "run"
    assert nursery.run(changed(train__steps=4), workdir)[0] == Exit.DONE
    code, log = nursery.run(changed(**mesh), workdir)
    assert code == Exit.DONE, log
    expected, actual = harness.curve(reference), harness.curve(workdir)
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    assert [row["loss"] for row in actual] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


@pytest.mark.slow
def test_one_bad_number_is_skipped_and_counted(nursery, config, reference, tmp_path):
    code, log = nursery.run(config, tmp_path / "run", fault="nan_once")
    assert code == Exit.DONE, log
    rows, expected = harness.curve(tmp_path / "run"), harness.curve(reference)
    assert rows[:4] == expected[:4]
    assert rows[4]["loss"] is None and [row["skipped"] for row in rows] == [0] * 4 + [1] * (STEPS - 4)
    assert rows[5]["loss"] != expected[5]["loss"]
    assert (tmp_path / "run" / "inspect" / "step_00000005.json").exists()


@pytest.mark.parametrize(
    "fault, options, code, message",
    [
        ("nan_streak", {}, Exit.DONE, "back to step 4, with other data"),
        slow("nan_streak", {"train__on_bad_steps": "abort"}, Exit.NUMERIC_ABORT, "at step 9; the last checkpoint is step 4"),
        slow("nan_for_ever", {}, Exit.NUMERIC_ABORT, "lower optim.learning_rate"),
        slow("nan_parameter", {}, Exit.DONE, "back to step 4, with other data"),
        slow("hang", {"train__watchdog_seconds": 4.0}, Exit.CRASH, "in harm"),
    ],
)
def test_what_persists_is_rolled_back_or_ended(nursery, changed, tmp_path, fault, options, code, message):
    actual, log = nursery.run(changed(checkpoint__every_steps=4, **options), tmp_path / "run", fault=fault)
    assert (actual, message in log) == (code, True), log
    if code == Exit.DONE:
        assert [row["step"] for row in harness.curve(tmp_path / "run")] == list(range(1, STEPS + 1))
        assert harness.steps_of(tmp_path / "run")[-1] == STEPS
