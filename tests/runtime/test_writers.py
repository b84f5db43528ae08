"""Metric tables: exact after any cut, the two formats alike; images and the progress line as a user sees them."""

import csv
import json
import math

import hypothesis
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st
from PIL import Image

from dip_jax.runtime import writers


def table(folder, resume_step: int = 0) -> writers.Table:
    return writers.Table(epath.Path(folder) / "metrics", resume_step=resume_step)


def row(step: int) -> dict:
    return {"step": step, "loss": 1 / step}


@hypothesis.given(st.integers(1, 20), st.integers(0, 25), st.integers(0, 400))
@hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_cut_file_joins_up_with_no_step_twice_and_none_missing(tmp_path_factory, written, resume, cut):
    folder = tmp_path_factory.mktemp("table")
    first = table(folder)
    for step in range(1, written + 1):
        first.add(row(step))
    text = (folder / "metrics.jsonl").read_text()
    complete = len([line for line in text[: len(text) - cut].split("\n")[:-1] if line]) if cut < len(text) else 0
    (folder / "metrics.jsonl").write_text(text[: max(len(text) - cut, 0)])
    resume = min(resume, complete)  # a checkpoint never lies beyond what was written before it
    second = table(folder, resume_step=resume)
    for step in range(resume + 1, 26):
        second.add(row(step))
    assert writers.read_rows(folder / "metrics.jsonl") == [row(step) for step in range(1, 26)]
    with open(folder / "metrics.csv", newline="") as file:
        assert [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(file)] == [(s, 1 / s) for s in range(1, 26)]


def test_new_column_reaches_both_files(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "extra": 5.0}, {"step": 3, "loss": 0.5}]
    one = table(tmp_path)
    for each in rows:
        one.add(each)
    assert writers.read_rows(tmp_path / "metrics.jsonl") == rows
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss,extra", "1,2.0,", "2,1.0,5.0", "3,0.5,"]


def test_rubbish_in_a_table_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n[1]\n\x00\x00\n{"step": "2"}\n{"step": 3')
    assert writers.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert writers.read_rows(tmp_path / "none.jsonl") == []


def test_writer_keeps_tables_apart_and_writes_valid_json(tmp_path):
    writer = writers.Writer(epath.Path(tmp_path))
    writer.scalars(1, {"loss": np.float32(0.25), "grad_norm": math.nan})
    writer.scalars(1, {"fid_lite0": 3.0}, table="eval")
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": 0.25, "grad_norm": None}
    assert writers.read_rows(tmp_path / "eval.jsonl") == [{"step": 1, "fid_lite0": 3.0}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_image_is_written_as_it_is(tmp_path):
    writer = writers.Writer(epath.Path(tmp_path))
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    path = writer.image(7, "samples", pixels)
    writer.close()
    assert path.name == "samples_00000007.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)


def test_progress_tells_loss_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(writers.time, "monotonic", iter([0.0, 0.0, 5.0, 10.0, 10.0]).__next__)
    progress = writers.Progress(total=3700, start=0)
    progress.update(1, {"loss": 1.5, "grad_norm": 2.0})
    progress.note({"images_per_second": 1320.4, "seconds_per_step": 0.1, "data_wait": 0.25, "mfu": 0.4126})
    progress.update(99, {"loss": 1.3, "grad_norm": 2.0})  # too soon for another line
    progress.note({})  # nothing measured anew
    progress.update(100, {"loss": 1.25, "grad_norm": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 1/3700  loss 1.5000  grad_norm 2.000",
        "step 100/3700  loss 1.2500  grad_norm 0.500  1,320 images/s  0.1 s/step  data wait 25%  MFU 41.3%  6m00s left",
    ]
    assert writers.progress_rhythm() == "a line every 10 s"


@pytest.mark.parametrize("seconds, text", [(5.0, "0m05s"), (3599.9, "59m59s"), (7325.0, "2h02m")])
def test_durations_read_well(seconds, text):
    assert writers.duration(seconds) == text
