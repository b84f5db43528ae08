"""The bridge from ConfigDict: unknown keys, wrong types and contradictions are one clear line; nothing is lost on the way."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest
from absl import flags
from ml_collections import ConfigDict
from places import ROOT

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.runtime import command_line

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(path: pathlib.Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_valid_and_says_how_to_run_it(path):
    config.from_config_dict(load(path))
    docstring = path.read_text()
    for word in ("Command:", "Hardware:", "Expected:"):
        assert word in docstring, f"{path.name} does not state {word}"


def test_round_trip_through_json():
    original = config.from_config_dict(load(CONFIGS[0]))
    assert config.from_dict(json.loads(json.dumps(config.to_dict(original)))) == original


def test_sizes_fill_what_is_not_set():
    assert (config.Model().depth, config.Model().width, config.Model().num_heads) == (26, 1152, 16)
    assert config.Model(size="B", depth=3).depth == 3
    assert config.Model(image_size=(128,)).image_size == (128, 128)
    assert config.Model(image_size=(128, 64)).image_size == (128, 64)


def broken(section: str, **values) -> ConfigDict:
    whole = ConfigDict(config.defaults().to_dict())
    with whole.ignore_type():
        whole[section].update(values)
    return whole


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", {"hed": "unet"}, ["model.hed", "model.head"]),
        ("optim", {"learning_rate": "fast"}, ["optim.learning_rate", "float", "str"]),
        ("train", {"steps": 1.5}, ["train.steps", "int"]),
        ("train", {"steps": True}, ["train.steps", "int"]),
        ("model", {"image_size": (60, 60)}, ["60", "patch_size=16", "64"]),
        ("model", {"image_size": (66, 66)}, ["66", "patch_size=16", "64"]),
        ("model", {"width": 100, "num_heads": 3}, ["100", "3"]),
        ("model", {"remat": "dot"}, ["'dot'", "'dots'"]),
        ("model", {"inject_after": 27}, ["27", "26"]),
        ("model", {"prediction": "noise"}, ["noise", "v, x, eps"]),
        ("flow", {"label_dropout": 1.5}, ["1.5"]),
        ("optim", {"ema_decays": (1.0,)}, ["ema_decays=(1.0,)"]),
        ("optim", {"ema_decays": ()}, ["ema_decays=()"]),
        ("optim", {"ema_decays": (0.9, 0.9)}, ["different"]),
        ("optim", {"accumulate": 3}, ["batch_size=256", "accumulate=3"]),
        ("mesh", {"data": -1, "fsdp": -1}, ["-1"]),
        ("sample", {"steps": 0}, ["steps=0", "1..1000"]),
        ("sample", {"interval": (0.9, 0.1)}, ["0.9"]),
        ("sample", {"solver": "eular"}, ["eular", "euler"]),
        ("sample", {"interval": ("a", 1.0)}, ["sample.interval", "float"]),
        ("sample", {"interval": (0.1, 0.5, 1.0)}, ["sample.interval", "2 values"]),
        ("sample", {"guidance": float("nan")}, ["guidance=nan"]),
        ("model", {"image_size": (64.0, 64.0)}, ["model.image_size", "int"]),
        ("mesh", {"rules": (("embed", "nosuch"),)}, ["nosuch", "data, fsdp, tensor"]),
        ("mesh", {"rules": ("embed",)}, ["mesh.rules"]),
        ("train", {"sample_every": -1}, ["sample_every=-1"]),
        ("optim", {"learning_rate": float("inf")}, ["learning_rate=inf"]),
        ("data", {"num_workers": -1}, ["num_workers=-1"]),
    ],
)
def test_mistakes_name_themselves(section, values, words):
    with pytest.raises(UserError) as error:
        config.from_config_dict(broken(section, **values))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_difference_lists_changed_keys():
    new = dataclasses.replace(config.Config(), optim=config.Optim(learning_rate=3e-4))
    assert config.difference(config.Config(), new) == ["optim.learning_rate: 0.0001 -> 0.0003"]


def parse(*argv: str) -> config.Config:
    values = flags.FlagValues()
    command_line.define_config(values)
    command_line.parse(values, "train", list(argv))
    return command_line.read_config(values)


DEMO = f"--config={CONFIGS[0].parent / 'demo.py'}"


def test_overrides_from_the_command_line():
    read = parse(DEMO, "--config.model.depth=3", "--config.sample.interval=0.2,0.9", "--config.optim.grad_clip=1.0")
    assert (read.model.depth, read.sample.interval, read.optim.grad_clip) == (3, (0.2, 0.9), 1.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--config"]),
        (["--config=nowhere.py"], ["nowhere.py", "no such file"]),
        ([DEMO, "--config.model.dept=3"], ["model.dept", "model.depth"]),
        ([DEMO, "--config.modl.depth=3"], ["modl", "model"]),
        ([DEMO, "--config.model.depth=three"], ["model.depth", "three"]),
        ([DEMO, "--cofig.model.depth=3"], ["cofig"]),
        ([DEMO, "stray"], ["stray", "--name=value"]),
    ],
)
def test_command_line_mistakes(argv, words):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["def get_config(:", "def get_config(arg=''):\n    raise RuntimeError('boom')"])
@pytest.mark.parametrize("override", [[], ["--config.model.depth=3"]])
def test_a_config_file_that_does_not_run(tmp_path, text, override):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        parse(f"--config={path}", *override)
