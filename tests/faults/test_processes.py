"""Runs of several processes: one preempted, killed or stopped; other process counts and meshes on the way."""

import pathlib
import signal
import time

import pytest
from faults import harness

from dip_jax.errors import Exit

CHANGES = {"train__steps": 14}


@pytest.fixture(scope="module")
def reference(nursery, config, tmp_path_factory) -> pathlib.Path:
    """Two processes of one device each, undisturbed."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    pair = nursery.start_several(2, config, workdir)
    assert [child.wait() for child in pair] == [Exit.DONE] * 2, pair[0].log
    return workdir


def finish(nursery, config, workdir, reference) -> None:
    pair = nursery.start_several(2, config, workdir)
    assert [child.wait() for child in pair] == [Exit.DONE] * 2, pair[0].log + pair[1].log
    harness.check_curve(workdir, reference)


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=str)
def test_all_save_the_same_step_whoever_was_told(nursery, config, reference, tmp_path, told, number):
    workdir = tmp_path / "run"
    pair = nursery.start_several(2, config, workdir, fault="slow_steps")
    pair[0].wait_for(lambda: len(harness.curve(workdir)) >= 4)
    start = time.monotonic()
    for index in told:
        pair[index].send(number)
    assert [child.wait(60) for child in pair] == [Exit.PREEMPTED] * 2, pair[0].log + pair[1].log
    assert time.monotonic() - start < 30
    last = harness.steps_of(workdir)[-1]
    assert all(f"saved step {last}" in child.log for child in pair)
    finish(nursery, config, workdir, reference)


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivor_ends_by_itself_and_the_pair_restarts(nursery, config, reference, tmp_path, victim, number):
    workdir = tmp_path / "run"
    pair = nursery.start_several(2, config, workdir, fault="slow_steps")
    pair[0].wait_for(lambda: len(harness.curve(workdir)) >= 4)
    pair[victim].send(number)
    start = time.monotonic()
    code = pair[1 - victim].wait(90)
    print(f"{number.name} of process {victim}: the other ended with {code} after {time.monotonic() - start:.1f} s")
    assert code not in (Exit.DONE, Exit.USER_ERROR, -99), pair[1 - victim].log
    assert time.monotonic() - start < 60
    pair[victim].send(signal.SIGKILL)
    pair[victim].wait()
    finish(nursery, config, workdir, reference)


@pytest.mark.campaign
@pytest.mark.parametrize("first, then", [(2, 1), (1, 4), (4, 2)], ids=str)
def test_another_process_count_goes_on_with_the_same_batches(nursery, config, changed, reference, tmp_path, first, then):
    workdir = tmp_path / "run"
    for count, part in ((first, changed(train__steps=6)), (then, config)):
        group = nursery.start_several(count, part, workdir)
        assert [child.wait() for child in group] == [Exit.DONE] * count, group[0].log
    print(f"{first} -> {then} processes: losses within {harness.check_losses(workdir, reference):.1e}")


@pytest.mark.campaign
def test_a_process_with_another_config_is_refused_by_all(nursery, config, changed, tmp_path):
    other = changed(optim__learning_rate=0.5)
    pair = nursery.start_several(2, config, tmp_path / "run", others=other)
    assert [child.wait(60) for child in pair] == [Exit.USER_ERROR] * 2, pair[0].log + pair[1].log
    assert all("config.optim.learning_rate: 0.001 in process 0, 0.5 in process 1" in child.log for child in pair)


@pytest.mark.campaign
def test_an_unreachable_coordinator_is_one_line(nursery, config, tmp_path):
    environment = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    child = nursery.start(config, tmp_path / "run", environment=environment)
    assert child.wait(90) != Exit.DONE
    assert "127.0.0.1:1" in child.log
    print(child.log)
