"""Interrupted runs end with the same curve, bit for bit, as one that nobody interrupted: real processes, real signals."""

import signal
import time

import numpy as np
import pytest
from faults import harness

from dip_jax.data import order, prepared
from dip_jax.errors import Exit
from dip_jax.runtime import writers

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
    print(f"on to {mesh}: losses within {harness.check_losses(workdir, reference):.1e}")


@pytest.mark.slow
def test_one_bad_number_is_skipped_and_counted(nursery, config, tmp_path):
    """The fault is part of the program and may move its sums in the last bit: the reference is the same program."""
    for fault in ("nan_once", "nan_never"):
        code, log = nursery.run(config, tmp_path / fault, fault=fault)
        assert code == Exit.DONE, log
    rows, expected = harness.curve(tmp_path / "nan_once"), harness.curve(tmp_path / "nan_never")
    assert rows[:4] == expected[:4]
    assert rows[4]["loss"] is None and [row["skipped"] for row in rows] == [0] * 4 + [1] * (STEPS - 4)
    assert rows[5]["loss"] != expected[5]["loss"]
    assert (tmp_path / "nan_once" / "inspect" / "step_00000005.json").exists()


@pytest.mark.parametrize(
    "fault, options, code, message",
    [
        ("nan_streak", {}, Exit.DONE, "back to step 4, with other data"),
        slow("nan_streak", {"train__on_bad_steps": "abort"}, Exit.NUMERIC_ABORT, "at step 9; the last checkpoint is step 4"),
        slow("nan_for_ever", {}, Exit.NUMERIC_ABORT, "lower optim.learning_rate"),
        slow("nan_parameter", {}, Exit.DONE, "back to step 4, with other data"),
        slow("hang", {"train__watchdog_seconds": 15.0}, Exit.CRASH, "in harm"),  # ten times as long for compiling
    ],
)
def test_what_persists_is_rolled_back_or_ended(nursery, changed, tmp_path, fault, options, code, message):
    actual, log = nursery.run(changed(checkpoint__every_steps=4, **options), tmp_path / "run", fault=fault)
    assert (actual, message in log) == (code, True), log
    if code == Exit.DONE:
        assert [row["step"] for row in harness.curve(tmp_path / "run")] == list(range(1, STEPS + 1))
        assert harness.steps_of(tmp_path / "run")[-1] == STEPS


@pytest.mark.slow
def test_replaced_records_are_counted_across_an_interruption(nursery, changed, tmp_path):
    dataset = harness.make_dataset(tmp_path / "set", bad=6)
    config = changed(data__path=str(dataset), data__on_bad_record="replace")
    code, log = nursery.run(config, tmp_path / "reference")
    assert code == Exit.DONE, log
    child = nursery.start(config, tmp_path / "run", fault="slow_steps")
    child.wait_for(lambda: len(harness.curve(tmp_path / "run")) >= 5)
    child.send(signal.SIGKILL)
    child.wait()
    assert nursery.run(config, tmp_path / "run")[0] == Exit.DONE
    harness.check_curve(tmp_path / "run", tmp_path / "reference")
    info = prepared.open_dataset(dataset)
    read = [order.batch_indices(len(info), batch_size=8, seed=0, step=k) for k in range(STEPS)]
    assert [row["replaced"] for row in harness.curve(tmp_path / "run")] == np.cumsum(
        [(records >= len(info) - 6).sum() for records in read]
    ).tolist()


@pytest.mark.slow
def test_a_failed_save_ends_the_run_before_the_next_one(nursery, changed, tmp_path):
    config = changed(train__steps=30, checkpoint__every_steps=5)
    code, log = nursery.run(config, tmp_path / "run", fault="second_save_fails")
    assert code == Exit.USER_ERROR, log
    assert "10 failed (OSError" in log and "the last good one is step 5; mend this" in log
    assert harness.steps_of(tmp_path / "run") == [5]
    assert harness.curve(tmp_path / "run")[-1]["step"] < 15, "it went on without knowing"


@pytest.mark.slow
def test_a_picture_that_a_kill_prevented_is_drawn_after_all(nursery, changed, tmp_path):
    config = changed(train__steps=4, train__sample_every=4)
    child = nursery.start(config, tmp_path, fault="killed_before_the_picture")
    assert child.wait() == -signal.SIGKILL, child.log
    assert harness.steps_of(tmp_path)[-1] == 4
    picture = tmp_path / "images" / "samples_00000004.png"
    assert not picture.exists()
    for expected in ("finished: 4 steps", "is finished: it has all 4 steps"):
        code, log = nursery.run(config, tmp_path)
        assert (code, expected in log) == (Exit.DONE, True), log
        assert picture.exists()


@pytest.mark.slow
def test_no_data_worker_outlives_a_killed_trainer(nursery, changed, tmp_path):
    child = nursery.start(changed(data__num_workers=2, train__steps=10_000), tmp_path / "run", fault="slow_steps")
    child.wait_for(lambda: len(harness.curve(tmp_path / "run")) >= 2)
    workers = harness.descendants(child.pid)
    assert len(workers) >= 2
    child.send(signal.SIGKILL)
    child.wait()
    start = time.monotonic()
    child.wait_for(lambda: not any(map(harness.lives, workers)), timeout=10)
    print(f"{len(workers)} processes of a killed trainer were gone after {time.monotonic() - start:.2f} s")


@pytest.mark.campaign
def test_two_thousand_steps_in_bfloat16_stay_finite(nursery, changed, tmp_path):
    config = changed(train__steps=2000, model__dtype="bfloat16", checkpoint__every_steps=500)
    code, log = nursery.run(config, tmp_path / "run", timeout=1200)
    assert code == Exit.DONE, log
    rows = writers.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 2001))
    assert rows[-1]["skipped"] == 0
    assert all(row[key] is not None for row in rows for key in ("loss", "grad_norm", "param_norm"))
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:100], rows[-100:]))
    assert last < first
    print(f"2,000 bfloat16 steps: all finite, none skipped; mean loss {first:.4f} -> {last:.4f}")
