"""Profiles: which steps are traced, who asks, and that nothing is lost where the profiler fails."""

import signal

import jax
import pytest
from etils import epath
from faults import harness

from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.runtime import profiling
from dip_jax.runtime.signals import Signals
from dip_jax.training import loop


@pytest.fixture
def traced(monkeypatch):
    """What the profiler was told, instead of a real one."""
    said: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    return said


def walk(profiler: profiling.Profiler, steps: range, before=lambda step: None) -> list[int]:
    """The steps at which a trace begins or ends."""
    turned = []
    for step in steps:
        before(step)
        if profiler.due(step):
            turned.append(step)
            profiler.turn(step)
    return turned


def make(tmp_path, *, planned=(0, 0), every=10, heard=lambda: False) -> profiling.Profiler:
    return profiling.Profiler(epath.Path(tmp_path), planned=planned, every=every, heard=heard)


def test_planned_steps_and_those_of_a_later_start(tmp_path, traced):
    assert walk(make(tmp_path, planned=(12, 15)), range(40)) == [12, 15]
    assert walk(make(tmp_path, planned=(12, 15)), range(14, 40)) == [14, 15]
    assert walk(make(tmp_path, planned=(12, 15)), range(15, 40)) == walk(make(tmp_path), range(40)) == []
    assert traced == ["start", "stop"] * 2


def test_a_file_asks_once_and_goes(tmp_path, traced):
    def drop(step: int) -> None:
        if step == 13:
            (tmp_path / "profile").touch()

    assert walk(make(tmp_path, planned=(30, 32)), range(60), drop) == [20, 25, 30, 32]
    assert not (tmp_path / "profile").exists()


def test_a_signal_asks(tmp_path, traced):
    def tell(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGUSR2)

    with Signals() as signals:
        assert walk(make(tmp_path, heard=signals.take_profile), range(40), tell) == [10, 15]
        assert signals.requested is None


def test_a_trace_under_way_is_kept_when_the_run_ends(tmp_path, traced, capfd):
    profiler = make(tmp_path, planned=(2, 9))
    assert walk(profiler, range(5)) == [2]
    profiler.close(5)
    assert traced == ["start", "stop"] and "profile of steps 3 to 5; to open it:" in capfd.readouterr().err


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_run_without_its_profiler_goes_on(dataset, tmp_path, monkeypatch, capfd, broken):
    def fail(*arguments):
        raise RuntimeError("no profiler here\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(jax.profiler, "start_trace", lambda folder: None)
        patch.setattr(jax.profiler, "stop_trace", lambda: None)
        patch.setattr(jax.profiler, broken, fail)
        options = harness.tiny_config(dataset, train__steps=6, train__profile_steps=(2, 4))
        train.train(options, workdir=tmp_path / "run")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("profile", "no profile"))]
    step = 2 if broken == "start_trace" else 4
    assert lines == [f"no profile at step {step} by process 0: RuntimeError: no profiler here"]
    assert [row["step"] for row in harness.curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_real_trace_lies_where_xprof_looks_and_changes_nothing(dataset, tmp_path, monkeypatch):
    train.train(harness.tiny_config(dataset, train__steps=5), workdir=tmp_path / "plain")
    done = loop.Run._settle

    def ask(self):
        done(self)
        if self._step == 1:
            (tmp_path / "run" / "profile").touch()

    monkeypatch.setattr(loop.Run, "_settle", ask)
    train.train(harness.tiny_config(dataset, train__steps=5), workdir=tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profiles" / "plugins" / "profile" / "step_00000001").glob("*-0.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    names = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    assert any("train_step" in name for name in names)
    harness.check_curve(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize("steps", [(5, 4), (-1, 3)])
def test_steps_in_the_wrong_order_are_refused(dataset, steps):
    with pytest.raises(UserError, match="must be first,last"):
        harness.tiny_config(dataset, train__profile_steps=steps)


@pytest.mark.slow
def test_every_process_writes_one(nursery, dataset, tmp_path):
    options = harness.tiny_config(dataset, train__steps=6, train__log_every=2, train__profile_steps=(2, 4))
    children = nursery.start_several(2, options, tmp_path / "run")
    codes = [child.wait() for child in children]
    assert codes == [0, 0], children[0].log
    folder = tmp_path / "run" / "profiles" / "plugins" / "profile" / "step_00000002"
    assert sorted(path.name.rpartition("-")[2] for path in folder.iterdir()) == ["0.xplane.pb", "1.xplane.pb"]
    assert children[0].log.count("to open it") == 1 and "to open it" not in children[1].log
