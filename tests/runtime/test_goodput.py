"""Where the hours go: parts that add up to the wall time, whatever ends a start, on a clock that the test moves."""

import json
import types

import pytest
from etils import epath

from dip_jax.errors import Exit, Interrupted
from dip_jax.runtime import goodput


@pytest.fixture
def clock(monkeypatch):
    """Wall and monotonic clock of the ledger, moved by hand; the monotonic one begins anew with every start of a host."""
    now = types.SimpleNamespace(wall=1_000_000.0, up=50.0)

    def move(seconds: float) -> None:
        now.wall, now.up = now.wall + seconds, now.up + seconds

    now.move = move
    monkeypatch.setattr(goodput, "_period", lambda local: 3600.0)  # the thread sleeps: the test writes where it would
    fake = types.SimpleNamespace(monotonic=lambda: now.up, time=lambda: now.wall)
    monkeypatch.setattr(goodput, "time", fake)
    return now


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return epath.Path(tmp_path)


def kill(ledger: goodput.Ledger) -> None:
    ledger._ended.set()
    ledger._thread.join()


def test_every_second_goes_to_one_part_and_a_kill_to_stopped(workdir, clock):
    first = goodput.Ledger(workdir, began=clock.up - 4)  # 4 s passed before the workdir was known
    first.at(0, compiling=True)
    clock.move(30)
    for step in range(1, 11):
        first.at(step, compiling=False)
        clock.move(2)
        if step == 5:
            with first.part("saving"):
                clock.move(7)
        if step == 8:
            clock.move(3)
            first.move(3.0, "data")
    first._write()
    clock.move(5)  # unseen by any write
    kill(first)
    assert goodput.read_starts(workdir)[0].exit is None
    clock.move(100)
    clock.up = 9.0  # another host
    with goodput.recording(workdir, began=clock.up) as second:
        clock.move(6)
        second.at(5, compiling=True)
        clock.move(20)
        for step in range(6, 14):
            second.at(step, compiling=False)
            clock.move(2)
            if step == 12:
                with second.part("showing"), second.part("profiling"):  # the inner one counts, then the outer one
                    clock.move(1)
    starts = goodput.read_starts(workdir)
    assert [(start.origin, start.step, start.exit) for start in starts] == [(0, 10, None), (5, 13, 0)]
    found = goodput.divide(starts)
    assert found == pytest.approx(
        {
            "steps": 20 + 8,
            "start_up": 4 + 6,
            "compiling": 30 + 20,
            "data": 3,
            "saving": 7,
            "showing": 0,
            "profiling": 1,
            "again": 8,
            "stopped": 105,
        }
    )
    assert sum(found.values()) == pytest.approx(starts[-1].last - starts[0].began) == pytest.approx(clock.wall - 1_000_000 + 4)
    shares = goodput.shares(found)
    assert shares["goodput"] == pytest.approx(28 / 212) and shares["wall_seconds"] == pytest.approx(212)
    assert sum(shares.values()) - 212 == pytest.approx(1.0)


def test_steps_after_a_rollback_are_done_again(workdir, clock):
    with goodput.recording(workdir, began=clock.up) as ledger:
        for step in (0, 1, 2, 3, 1, 2, 3, 4):
            ledger.at(step, compiling=False)
            clock.move(1)
    found = goodput.divide(goodput.read_starts(workdir))
    assert (found["steps"], found["again"]) == (6, 2)


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (Interrupted("saved", code=Exit.PREEMPTED), 85), (RuntimeError("lost a device"), 1)],
    ids=["done", "preempted", "crash"],
)
def test_a_start_notes_how_it_ended(workdir, clock, error, code):
    try:
        with goodput.recording(workdir, began=clock.up):
            if error:
                raise error
    except (Interrupted, RuntimeError) as raised:
        assert raised is error
    (start,) = goodput.read_starts(workdir)
    assert start.exit == code and not start.runs(clock.wall, local=True)


def test_a_start_that_came_to_nothing_and_a_file_that_is_damaged_do_no_harm(tmp_path, clock):
    workdir = epath.Path(tmp_path)
    with goodput.recording(workdir, began=clock.up) as ledger:
        ledger._write()
    with goodput.recording(None, began=clock.up):  # another host
        pass
    assert not list(tmp_path.iterdir())
    for text in ("{", "[]", '{"starts": [{}]}', json.dumps({"starts": 3})):
        (tmp_path / "goodput.json").write_text(text)
        assert goodput.read_starts(workdir) == []


def test_a_sign_of_life_is_given_while_the_loop_is_busy(workdir, monkeypatch):
    monkeypatch.setattr(goodput, "_period", lambda local: 0.05)
    ledger = goodput.Ledger(workdir, began=goodput.time.monotonic())
    with ledger.part("showing"):
        goodput.time.sleep(0.5)
        (start,) = goodput.read_starts(workdir)
        assert 0.3 < start.seconds["showing"] <= 0.6
        assert start.runs(goodput.time.time(), local=True) and not start.runs(start.last + 10, local=True)
    ledger.close(0)


def test_every_gap_between_starts_is_stopped_and_a_clock_that_is_behind_takes_nothing_away():
    moments = ((100.0, 110.0), (130.0, 140.0), (139.0, 150.0), (155.0, 160.0))  # the third host's clock is a second behind
    starts = [goodput.Start(began, last, 0, 1, {"steps": last - began}) for began, last in moments]
    found = goodput.divide(starts)
    assert (found["stopped"], found["steps"]) == (25, 36)
    assert goodput.divide(starts[:1])["stopped"] == 0 and sum(goodput.divide([]).values()) == 0
