"""Several averages of the weights in one run: saved, read one at a time, resumed, handed out."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from faults import harness

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import averages, checkpoint, manifest
from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.training import config_change

DECAYS = (0.9, 0.5)


def options(dataset, *decays: float, **changes) -> config.Config:
    return harness.tiny_config(dataset, optim__ema_decays=decays, train__steps=4, **changes)


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "run"
    train.train(options(dataset, *DECAYS), workdir=folder)
    return folder


@pytest.fixture(scope="module")
def single(dataset, tmp_path_factory):
    """The same run with one average, whose checkpoints are those of before there were several."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train.train(options(dataset, DECAYS[0]), workdir=folder)
    return folder


def arrays(path, **which):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoint.load(path, **which)[1])]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def test_each_average_is_an_item_and_is_loaded_by_its_decay(workdir, single):
    assert sorted(path.name for path in (workdir / "checkpoints" / "4").iterdir() if path.is_dir()) == [
        "config",
        "ema",
        "ema_1",
        "state",
    ]
    assert equal(arrays(workdir), arrays(workdir, ema=0.9)) and equal(arrays(workdir), arrays(single))
    assert not equal(arrays(workdir), arrays(workdir, ema=0.5))
    assert equal(arrays(workdir, ema=0.5), arrays(workdir, weights="ema_1"))
    with pytest.raises(UserError, match=r"no average of decay 0.7: the run kept 0.9, 0.5 \(optim.ema_decays\)"):
        checkpoint.load(workdir, ema=0.7)


def test_a_reader_of_one_touches_no_other(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    step = tmp_path / "copy" / "checkpoints" / "4"
    first, second = arrays(workdir), arrays(workdir, ema=0.5)
    shutil.rmtree(step / "ema")
    shutil.rmtree(step / "state")
    assert equal(arrays(tmp_path / "copy", ema=0.5), second)
    shutil.copytree(workdir / "checkpoints" / "4" / "ema", step / "ema")
    shutil.rmtree(step / "ema_1")
    assert equal(arrays(step), first)
    assert manifest.damage(epath.Path(step), unread=averages.UNREAD["ema_1"]) is not None


def test_a_run_goes_on_to_the_same_bits(dataset, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train.train(options(dataset, *DECAYS), workdir=tmp_path / "run")
    for decay in DECAYS:
        assert equal(arrays(tmp_path / "run", ema=decay), arrays(workdir, ema=decay))


def test_a_checkpoint_of_before_there_were_several_goes_on_to_the_same_bits(dataset, single, tmp_path):
    shutil.copytree(single, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    record = tmp_path / "run" / "checkpoints" / "2" / "config" / "metadata"
    values = json.loads(record.read_text())
    assert values["config"]["optim"].pop("ema_decays") == [0.9]
    values["config"]["optim"]["ema_decay"] = 0.9
    record.write_text(json.dumps(values))
    manifest.write_manifest(epath.Path(record).parent.parent)
    train.train(options(dataset, DECAYS[0]), workdir=tmp_path / "run")
    assert equal(arrays(tmp_path / "run"), arrays(single))
    assert equal(arrays(tmp_path / "run", weights="raw"), arrays(single, weights="raw"))


def test_one_can_be_taken_away_but_none_can_begin_later(dataset, workdir, single, tmp_path):
    with pytest.raises(UserError, match=r"averages of decay \(0.9,\), not \(0.9, 0.5\): .* none can begin in its middle"):
        config_change.check(options(dataset, 0.9), options(dataset, *DECAYS), allowed=["optim.ema_decays"])
    with pytest.raises(UserError, match=r"--allow_change=optim\.ema_decays"):
        config_change.check(options(dataset, *DECAYS), options(dataset, 0.5), allowed=[])
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train.train(options(dataset, 0.5), workdir=tmp_path / "run", allow_change=["optim.ema_decays"])
    assert equal(arrays(tmp_path / "run"), arrays(workdir, ema=0.5))
    assert averages.carried_over((0.9,), (0.8,)) == ["ema"] and averages.carried_over(DECAYS, (0.9, 0.8)) is None


def test_commands_take_the_decay(workdir, tmp_path, capsys):
    drawn = {}
    for name, flags in {"first": [], "same": ["--ema_decay=0.9"], "second": ["--ema_decay=0.5"]}.items():
        out = tmp_path / f"{name}.npz"
        assert main(["sample", f"--workdir={workdir}", "--num_samples=6", f"--out={out}", *flags]) == 0
        with np.load(out) as file:
            drawn[name] = file["arr_0"]
    assert np.array_equal(drawn["first"], drawn["same"]) and not np.array_equal(drawn["first"], drawn["second"])
    assert json.loads((tmp_path / "second.npz.json").read_text())["weights"] == "ema of decay 0.5"
    capsys.readouterr()
    for wrong in (["--ema_decay=0.7"], ["--ema_decay=0.5", "--noema"]):
        assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'no.npz'}", *wrong]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "no average of decay 0.7" in said[0] and "not both" in said[1]


def test_a_release_hands_out_one_of_them(workdir, tmp_path, capsys):
    out = tmp_path / "out"
    convert = ["convert", f"--checkpoint={workdir}", f"--out={out}"]
    for wrong, said in (
        (["--to=release", "--ema_decay=0.7"], "no average of decay 0.7: the run kept 0.9, 0.5"),
        (["--to=release", "--ema_decay=0.5", "--weights=raw"], "not both"),
        (["--ema_decay=0.5"], "--ema_decay would not be read"),
    ):
        assert main([*convert, *wrong]) == 2 and said in capsys.readouterr().err and not out.exists()
    assert main([*convert, "--to=release", "--ema_decay=0.5"]) == 0
    assert "ema of decay 0.5 weights" in capsys.readouterr().out
    assert equal(arrays(out), arrays(workdir, ema=0.5)) and equal(arrays(out, ema=0.5), arrays(workdir, ema=0.5))
    assert "decay 0.5" in (out / "README.md").read_text()


def test_configs_of_before_are_read():
    values = config.to_dict(config.Config())
    del values["optim"]["ema_decays"]
    values["optim"]["ema_decay"] = 0.25
    assert config.from_dict(values).optim.ema_decays == (0.25,)
    written = config.defaults()
    written.optim.update(ema_decay=0.5)  # as a config file of before does
    assert config.from_config_dict(written).optim.ema_decays == (0.5,)
