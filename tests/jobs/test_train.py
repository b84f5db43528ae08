"""The train command: what it refuses before compiling, what it leaves, and how it says so."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from faults import harness
from PIL import Image
from places import ROOT

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.jobs import train
from dip_jax.runtime import storage, writers
from dip_jax.runtime.lock import Lock
from dip_jax.runtime.signals import Signals
from dip_jax.training import config_change, state, step


@pytest.fixture
def no_compilation(monkeypatch):
    """Fails the test if anything is compiled."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled before the mistake was found")

    monkeypatch.setattr(step, "compile_train_step", refuse)
    monkeypatch.setattr(state, "init_sharded", refuse)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of 6 steps, which took its number of classes from the dataset."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    changes = {"train__steps": 6, "train__sample_every": 4, "train__log_every": 2, "model__num_classes": 0}
    train.train(harness.tiny_config(dataset, **changes), workdir=workdir)
    return workdir


def test_a_run_leaves_what_the_readme_promises(finished, dataset):
    assert harness.steps_of(finished) == [2, 4, 6]
    rows = writers.read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert set(rows[0]) >= {"step", "loss", "grad_norm", "skipped", "images_per_second"}
    assert sorted(p.name for p in (finished / "images").iterdir()) == ["samples_00000004.png", "samples_00000006.png"]
    assert np.asarray(Image.open(finished / "images" / "samples_00000006.png")).std() > 0
    assert config.from_dict(json.loads((finished / "config.json").read_text())).data.path == str(dataset)
    assert list((finished / "tensorboard").iterdir())
    model, params = checkpoint.load(finished)
    assert model.config.num_classes == 3  # the config said 0: the dataset's
    output = model.apply(params, jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert output.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_running_a_finished_run_again_says_so_and_does_nothing(finished, dataset, num_classes, capsys, no_compilation):
    before = {path: path.stat().st_mtime_ns for path in harness.files_of(finished) if path.name != "lock"}
    changes = {"train__steps": 6, "train__sample_every": 4, "train__log_every": 2, "model__num_classes": num_classes}
    train.train(harness.tiny_config(dataset, **changes), workdir=finished)
    assert "is finished: it has all 6 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in harness.files_of(finished) if path.name != "lock"} == before


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optim__learning_rate": 0.5},
            r"another config \(optim.learning_rate: 0.001 -> 0.5\).*--allow_change=optim.learning_rate",
        ),
        ({"model__depth": 2, "train__seed": 3}, r"model.depth: 1 -> 2; .*train.seed: 0 -> 3"),
        ({"data__batch_size": 16}, r"data.batch_size: 8 -> 16"),
        ({"data__path": "/nowhere/at/all"}, r"no dataset at /nowhere/at/all: prepare one with `python -m dip_jax prepare"),
        ({"mesh__data": 3}, r"needs 3 devices but there are 8"),
        ({"train__steps": 7, "optim__schedule": "cosine"}, r"optim.schedule: constant -> cosine; train.steps: 6 -> 7"),
    ],
    ids=str,
)
def test_a_workdir_refuses_what_does_not_belong_to_it(finished, dataset, changes, message, no_compilation):
    with pytest.raises(UserError, match=message):
        train.train(harness.tiny_config(dataset, **{"train__steps": 6, **changes}), workdir=finished)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__batch_size": 12}, r"data.batch_size=12 is not divisible by the 8 parts"),
        ({"model__num_classes": 4}, r"num_classes=4 but .* has 3 classes: set --config.model.num_classes=3, or 0 for"),
        ({"model__head": "unett"}, r"model.head='unett' is unknown: it is one of unet, "),
        ({"model__placement": "posthoc"}, r"model.placement='posthoc' is unknown: it is one of post_hoc, "),
        ({"model__image_size": (32, 32)}, r"16x16 images"),
        ({"model__attention": "cudnn"}, r"model.attention=cudnn needs a GPU but the devices are cpu"),
        ({"checkpoint__keep_best": "fid", "train__eval_every": 3}, r"train.eval_every=3 to be a multiple of .*every_steps=2"),
    ],
    ids=str,
)
def test_a_new_run_refuses_what_does_not_fit_together(tmp_path, dataset, changes, message, no_compilation):
    with pytest.raises(UserError, match=message):
        train.train(harness.tiny_config(dataset, **changes), workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_failed_start_takes_away_its_own_files_alone(tmp_path, dataset, no_compilation):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="num_classes=4"):
        train.train(harness.tiny_config(dataset, model__num_classes=4), workdir=tmp_path / "w")
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["notes.txt"]


def test_other_data_under_the_same_path_is_refused(finished, tmp_path, no_compilation):
    other = harness.make_dataset(tmp_path / "set", seed=1)
    with pytest.raises(UserError, match=r"trained with data fingerprint=.* but this run has"):
        train.train(harness.tiny_config(other, train__steps=7, train__sample_every=4), workdir=finished)


def test_unwritable_workdir_and_second_run_are_refused(tmp_path, dataset, no_compilation):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.train(harness.tiny_config(dataset), workdir=tmp_path / "file" / "run")
    lock = Lock(storage.absolute(tmp_path))
    lock.acquire()
    with pytest.raises(UserError, match="in use by"):
        train.train(harness.tiny_config(dataset), workdir=tmp_path)
    lock.release()


@pytest.mark.parametrize("command", ["train --config=configs/demo.py --workdir=nowhere", "sample --checkpoint={} --out=x.png"])
def test_missing_accelerator_is_one_line(command, finished, tmp_path):
    argv = [sys.executable, "-m", "dip_jax", *command.format(finished).split()]
    environment = {**os.environ, "JAX_PLATFORMS": "tpu", "PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1"}
    if command.startswith("train"):
        argv[argv.index("--config=configs/demo.py")] = f"--config={ROOT / 'configs' / 'demo.py'}"
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == Exit.USER_ERROR
    assert "JAX_PLATFORMS=tpu asks for an accelerator that is not there" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "section, change, allowed",
    [
        ("train", {"log_every": 3}, ()),
        ("checkpoint", {"keep_last": 1}, ()),
        ("train", {"steps": 10}, ()),
        ("optim", {"learning_rate": 0.5}, ("optim.learning_rate",)),
        ("mesh", {"fsdp": 2}, ()),
    ],
)
def test_harmless_and_allowed_changes_pass(section, change, allowed):
    old = config.Config()
    new = dataclasses.replace(old, **{section: dataclasses.replace(getattr(old, section), **change)})
    config_change.check(old, new, allowed=allowed)


def test_every_free_key_exists():
    known = {section: set(values) for section, values in config.to_dict(config.Config()).items()}
    for key in config_change.FREE:
        section, _, name = key.partition(".")
        assert section in known and (not name or name in known[section]), key


def test_step_is_compiled_once_and_fetched_without_implicit_transfers(dataset, tmp_path, monkeypatch):
    original, made = step.compile_train_step, []

    def keep(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(step, "compile_train_step", keep)
    train.train(harness.tiny_config(dataset, train__steps=5), workdir=tmp_path / "a")
    train.train(harness.tiny_config(dataset, train__steps=8), workdir=tmp_path / "a")
    assert [each._cache_size() for each in made] == [1, 1]


def test_interruption_raises_the_code_after_saving(dataset, tmp_path, monkeypatch):
    seen = []

    class Asking(Signals):
        def __enter__(self):
            self.requested = Exit.INTERRUPTED if seen else None
            seen.append(True)
            return self

    monkeypatch.setattr(train, "Signals", Asking)
    train.train(harness.tiny_config(dataset, train__steps=3), workdir=tmp_path)
    with pytest.raises(Interrupted, match=r"saved step 3 .*run the same command again to go on") as stop:
        train.train(harness.tiny_config(dataset, train__steps=9), workdir=tmp_path)
    assert stop.value.code == Exit.INTERRUPTED
    assert harness.steps_of(tmp_path)[-1] == 3


def test_command_line_says_what_is_missing_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [])
    for flags, message in (
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path}"], "--config is missing"),
        ([f"--workdir={tmp_path}", "--config=configs/demo.py", "--config.data.path=none"], "no dataset at none"),
    ):
        assert main(["train", *flags]) == Exit.USER_ERROR
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
