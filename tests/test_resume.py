"""Interrupted runs end with the same curve, bit for bit, as one that nobody interrupted: real processes, real signals."""

import pathlib
import signal

import pytest
from faults import harness

from dip_jax.errors import Exit

STEPS = 10


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with harness.Nursery(tmp_path_factory.mktemp("logs")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return harness.tiny_config(harness.make_dataset(tmp_path_factory.mktemp("data") / "set"), train__steps=STEPS)


@pytest.fixture(scope="module")
def reference(nursery, tiny, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("reference") / "run"
    code, log = nursery.run(tiny, workdir)
    assert code == Exit.DONE, log
    return workdir


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
def test_the_curve_joins_up(nursery, tiny, reference, tmp_path, number, code):
    workdir = tmp_path / "run"
    child = nursery.start(tiny, workdir, fault="slow_steps")
    child.wait_for(lambda: len(harness.curve(workdir)) >= 5)
    child.send(number)
    assert child.wait() == code, child.log
    if number != signal.SIGKILL:
        assert "run the same command again to go on" in child.log
        assert f"saved step {harness.steps_of(workdir)[-1]}" in child.log
    code, log = nursery.run(tiny, workdir)
    assert code == Exit.DONE, log
    assert "going on from step" in log
    harness.check_curve(workdir, reference)


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_batches(nursery, tiny, reference, tmp_path):
    workdir = tmp_path / "run"
    values = {"train__steps": 4}
    half = harness.tiny_config(pathlib.Path(tiny.data.path), **values)
    assert nursery.run(half, workdir)[0] == Exit.DONE
    other = harness.tiny_config(pathlib.Path(tiny.data.path), train__steps=STEPS, mesh__data=1, mesh__fsdp=2)
    code, log = nursery.run(other, workdir)
    assert code == Exit.DONE, log
    expected, actual = harness.curve(reference), harness.curve(workdir)
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    assert [row["loss"] for row in actual] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


@pytest.mark.slow
def test_one_bad_number_is_skipped_and_counted(nursery, tiny, reference, tmp_path):
    code, log = nursery.run(tiny, tmp_path / "run", fault="nan_once")
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
def test_what_persists_is_rolled_back_or_ended(nursery, tiny, tmp_path, fault, options, code, message):
    config = harness.tiny_config(pathlib.Path(tiny.data.path), train__steps=STEPS, checkpoint__every_steps=4, **options)
    actual, log = nursery.run(config, tmp_path / "run", fault=fault)
    assert (actual, message in log) == (code, True), log
    if code == Exit.DONE:
        assert [row["step"] for row in harness.curve(tmp_path / "run")] == list(range(1, STEPS + 1))
        assert harness.steps_of(tmp_path / "run")[-1] == STEPS
