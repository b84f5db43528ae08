"""Trackers: every step once, the same run after a kill, nothing without the package, a run that outlives its tracker."""

import importlib
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from faults import harness

from dip_jax import config
from dip_jax.errors import Exit, UserError
from dip_jax.jobs import train
from dip_jax.runtime import trackers, writers
from dip_jax.training import state, step

MISSING = {name: importlib.util.find_spec(kind.package) is None for name, kind in trackers.TRACKERS.items()}


class Told:
    """A tracker that notes what it is told."""

    def __init__(self, run, workdir, config):
        self.run, self.config, self.lines = run, config, []

    def scalars(self, step, values):
        self.lines.append((step, values))

    def image(self, step, name, pixels):
        self.lines.append((step, name))

    def close(self):
        self.lines.append("closed")


@pytest.fixture
def opened(monkeypatch):
    """Every tracker that was opened."""
    found = []
    kind = trackers._Kind("json", "json", lambda *args: found.append(Told(*args)) or found[-1], "try again")
    monkeypatch.setitem(trackers.TRACKERS, "wandb", kind)
    return found


def test_the_names_in_the_config_are_the_table():
    for name in ("", *trackers.TRACKERS):
        config.Train(tracker=name)
    with pytest.raises(UserError, match="wandb, mlflow"):
        config.Train(tracker="wandbb")


def test_a_step_is_told_once_over_any_number_of_starts(tmp_path, opened):
    workdir = epath.Path(tmp_path)
    options = config.Config(train=config.Train(tracker="wandb"))
    for resume, last in ((0, 6), (2, 4), (2, 8)):  # killed after step 6, saved at 2; then after 4; then it ends
        writer = writers.Writer(workdir, resume_step=resume, config=options)
        for number in range(resume + 1, last + 1):
            writer.scalars(number, {"loss": 1.0 / number, "broken": float("nan")})
    writer.scalars(8, {"fid": 3.0}, table="eval")
    writer.image(8, "samples", np.zeros((2, 2, 3), np.uint8))
    writer.close()
    assert len({each.run for each in opened}) == 1 and opened[0].config["train"]["tracker"] == "wandb"
    lines = [line for each in opened for line in each.lines]
    assert lines[:8] == [(number, {"metrics/loss": 1.0 / number}) for number in range(1, 9)]
    assert lines[8:] == [(8, {"eval/fid": 3.0}), (8, "samples"), "closed"]
    assert [row["step"] for row in writers.read_rows(workdir / "metrics.jsonl")] == list(range(1, 9))


def test_a_tracker_that_fails_on_the_way_is_told_no_more(tmp_path, opened, capfd):
    tracker = trackers.Tracker("wandb", epath.Path(tmp_path), {}, logged=0)
    opened[0].scalars = lambda step, values: 1 / 0
    for number in (1, 2):
        tracker.scalars(number, {"loss": 1.0}, table="metrics")
    tracker.close()
    assert opened[0].lines == []
    assert capfd.readouterr().err == "the tracker failed at step 1 and is told no more: ZeroDivisionError: division by zero\n"


def test_a_tracker_that_does_not_begin_is_one_line(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no login\nand more")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", trackers._Kind("json", "json", fail, "log in"))
    with pytest.raises(UserError, match=r"train.tracker=wandb does not begin \(RuntimeError: no login\): log in") as error:
        trackers.Tracker("wandb", epath.Path(tmp_path), {}, logged=0)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_before_compiling(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", trackers._Kind("no_such_package", "mlflow-skinny", Told, ""))
    for module, name in ((step, "compile_train_step"), (state, "init_sharded")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("compiled before the mistake was found"))
    with pytest.raises(UserError, match="needs another package: pip install mlflow-skinny"):
        train.train(harness.tiny_config(dataset, train__tracker="mlflow"), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def records(path: pathlib.Path) -> list:
    """What a .wandb file holds: records of LevelDB's log format behind a header of 7 bytes."""
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, position, found, parts = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            found.append(proto.Record.FromString(parts))
            parts = b""
    return found


@pytest.mark.skipif(MISSING["wandb"], reason="needs the package wandb (extra test)")
def test_wandb_offline_goes_on_with_its_run_after_a_kill(nursery, dataset, tmp_path):
    changes = {"train__steps": 8, "train__tracker": "wandb", "checkpoint__every_steps": 8}
    changes |= {"train__sample_every": 7}
    options, workdir = harness.tiny_config(dataset, **changes), tmp_path / "run"
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    child = nursery.start(options, workdir, fault="hang", environment=environment)
    child.wait_for(lambda: len(harness.curve(workdir)) == 3)
    child.pause(4.0)  # W&B writes once in a second
    child.send(signal.SIGKILL)
    child.wait()
    code, log = nursery.run(options, workdir, environment=environment)
    assert code == Exit.DONE, log
    run = json.loads((workdir / "tracker.json").read_text())["wandb"]["run"]
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{run}.wandb"] * 2
    rows, shares, pictures = {}, [], 0
    for path in files:
        shares.append(len(rows))
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                pictures += "images/samples" in str(values)
                if "metrics/loss" in values:
                    assert values["_step"] not in rows, "a step twice"
                    rows[values["_step"]] = values["metrics/loss"]
            elif record.WhichOneof("record_type") == "run":
                assert record.run.run_id == run
    expected = {row["step"]: row["loss"] for row in harness.curve(workdir)}
    assert rows == pytest.approx(expected) and list(expected) == list(range(1, 9))
    assert pictures == 2
    assert shares == [0, 3]  # the second start did all steps again and told of the new ones


@pytest.mark.skipif(MISSING["mlflow"], reason="needs the package mlflow-skinny (extra mlflow)")
def test_mlflow_goes_on_with_its_run(tmp_path):
    script = (
        "import sys; import numpy as np; from etils import epath; from dip_jax.runtime import trackers\n"
        "tracker = trackers.Tracker('mlflow', epath.Path(sys.argv[1]), {'a': {'b': 1}}, logged=int(sys.argv[2]))\n"
        "for step in range(1, 5): tracker.scalars(step, {'loss': 1 / step}, table='metrics')\n"
        "tracker.image(4, 'samples', np.zeros((4, 4, 3), np.uint8)); tracker.close()\n"
        "from mlflow import MlflowClient; client = MlflowClient()\n"
        "runs = client.search_runs([e.experiment_id for e in client.search_experiments()])\n"
        "print([[m.step for m in client.get_metric_history(r.info.run_id, 'metrics/loss')] for r in runs])\n"
    )
    environment = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/store", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for logged in (0, 4):
        words = [sys.executable, "-c", script, str(tmp_path), str(logged)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)
        assert done.stdout.splitlines()[-1:] == ["[[1, 2, 3, 4]]"], done.stderr
        assert "told no more" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("store/*/*/artifacts/images/samples_00000004.png"))) == 1
