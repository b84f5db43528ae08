"""A path that is no checkpoint: `load` says in one line what lies there instead."""

import jax
import pytest

import dip_jax
from dip_jax import config
from dip_jax.checkpoints import checkpoint, directories
from dip_jax.errors import UserError
from dip_jax.models import dip

FOUND = {
    "weights.pt": ("weights.pt", r"is a PyTorch file: .* `python -m dip_jax convert`"),
    "image.png": ("image.png", r"is a file, not a directory: give a workdir"),
    "torch folder": ("model.safetensors", r"holds no checkpoint, it holds a PyTorch file \(model.safetensors\)"),
    "dataset": ("dataset.json", r"holds no checkpoint, it holds a dataset"),
    "stopped early": (
        "checkpoints/100.orbax-checkpoint-tmp-1/x",
        r"holds no checkpoint, it holds only a save that was not finished",
    ),
    "another Orbax layout": ("default/manifest.ocdbt", r"checkpoint of another layout \(default\): it lacks the item config"),
    "flax": ("checkpoint_100", r"checkpoint of another library \(checkpoint_100\)"),
    "something": ("notes/todo.txt", r"holds no checkpoint, it holds notes: give a workdir"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_lies_there_instead(case, tmp_path):
    name, message = FOUND[case]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(UserError, match=message) as caught:
        dip_jax.load(path if case == name else tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint, it is empty"):
        dip_jax.load(tmp_path)
    with pytest.raises(UserError, match="is no directory: give a workdir"):
        dip_jax.load(tmp_path / "none")


def test_a_bucket_without_its_package(monkeypatch):
    def is_dir(self):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("etils.epath.gpath._GPath.is_dir", is_dir)
    with pytest.raises(UserError, match=r"gs://bucket/run lies in a bucket.*pip install gcsfs"):
        dip_jax.load("gs://bucket/run")


def test_a_missing_item_is_named_with_those_that_are_there(tmp_path):
    fields = {"size": "tiny", "depth": 1, "width": 16, "num_heads": 1, "patch_size": 8, "image_size": (16, 16), "head": "none"}
    settings = config.Config(model=config.Model(num_classes=2, **fields))
    params = jax.jit(dip.from_config(settings.model).init)(jax.random.key(0))
    checkpoint.write_weights(tmp_path, params, config=settings, step=3)
    with pytest.raises(UserError, match=r"holds no item 'state', only config, ema: .* weights='ema'"):
        dip_jax.load(tmp_path, weights="raw")
    step = directories.find(tmp_path, verify=True, report=print)
    older = (step / "config" / "metadata").read_text().replace('"head_pool"', '"pool"')
    (step / "config" / "metadata").write_text(older)
    with pytest.raises(UserError, match=r"other options than this version knows: unknown config key model.pool"):
        dip_jax.load(step, verify=False)
