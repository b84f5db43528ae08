"""`python -m dip_jax sample` as its user meets it: pictures, files, mistakes in one line. Kills are in test_sample_hosts.py."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint, directories, manifest
from dip_jax.models import dip
from dip_jax.sampling import sample_files

MODEL = {"size": "tiny", "depth": 1, "width": 16, "num_heads": 2, "patch_size": 8, "image_size": (16, 16), "num_classes": 4}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A checkpoint of random weights whose config asks for 3 unguided steps."""
    values = config.to_dict(config.Config())
    values["model"] |= {**MODEL, "head": "none", "dtype": "float32", "inject_after": 1}
    values["sample"] |= {"steps": 3, "guidance": 1.0, "batch_size": 8}
    settings = config.from_dict(values)
    key = jax.random.key(1)
    model = dip.from_config(settings.model)
    params = jax.jit(lambda: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), model.init(key)))()
    folder = tmp_path_factory.mktemp("run")
    checkpoint.write_weights(folder, params, config=settings, step=7)
    return folder


def test_grid_npz_and_folder_hold_the_same_samples(workdir, tmp_path):
    out = {name: str(tmp_path / name) for name in ("grid.png", "samples.npz", "samples", "steps.png")}
    base = ["sample", f"--workdir={workdir}", "--num_samples=10"]
    assert main([*base, f"--out={out['samples.npz']}"]) == 0
    assert main([*base, f"--out={out['samples']}"]) == 0
    assert main([*base, f"--out={out['grid.png']}", f"--trajectory={out['steps.png']}"]) == 0
    with np.load(out["samples.npz"]) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]  # interleaved
    assert images.shape == (10, 16, 16, 3) and len({image.tobytes() for image in images}) == 10
    pictures = sorted((tmp_path / "samples").glob("*.png"))
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in pictures], images)
    grid = np.asarray(Image.open(out["grid.png"]))
    corner = np.kron(images[0], np.ones((6, 6, 1), np.uint8))  # enlarged to 96 pixels
    assert any(np.array_equal(grid[16:112, left : left + 96], corner) for left in range(grid.shape[1] - 96))
    with Image.open(out["steps.png"]) as strip:
        assert strip.size[0] > 3 * 96


def test_a_step_without_its_training_state_is_enough(workdir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    with (copy / directories.ROOT / "7" / manifest.MANIFEST).open("a") as file:
        file.write(f"{'0' * 64}  state/array_metadatas\n")  # of an item that training would have written
    assert main(["sample", f"--workdir={copy}", "--num_samples=2", f"--out={tmp_path / 'two.png'}"]) == 0
    assert main(["sample", f"--workdir={copy}", "--num_samples=2", "--noema", f"--out={tmp_path / 'two.npz'}"]) == 2


def test_settings_state_the_protocol(workdir, tmp_path):
    out = tmp_path / "samples.npz"
    assert main(["sample", f"--workdir={workdir}", "--num_samples=4", "--labels=2,3", f"--out={out}"]) == 0
    settings = sample_files.read_settings(out)
    expected = {"samples": 4, "seed": 0, "solver": "euler", "steps": 3, "guidance": 1.0, "weights": "ema", "step": "7"}
    assert {key: settings[key] for key in expected} == expected
    assert settings["nfe"] == {"conditional": 3, "unconditional": 0} and settings["model"]["dtype"] == "float32"
    with np.load(out) as file:
        assert file["arr_1"].tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels=4000"], "label 4000 is not a class: this model has 0..3"),
        (["--labels=cat"], "--labels: 'cat' is not a number"),
        (["--labels=1", "--classes=2"], "name one of --labels and --classes"),
        (["--classes=5"], "--classes=5 must lie in 1..4"),
        (["--steps=0"], "sample.steps=0 must lie in 1..1000"),
        (["--solver=eule"], "did you mean 'euler'?"),
        (["--interval=0.5"], "must be low,high"),
        (["--interval=0.5,x"], "--interval: 'x' is not a number"),
        (["--num_samples=0"], "num_samples"),
        (["--seed=-1"], "seed=-1 must lie in"),
        (["--checkpoint=elsewhere"], "name one of --workdir"),
        (["--noema"], "holds no item 'state'"),
        (["--out=/proc/nothing/here/samples.npz"], "cannot be written"),
        (["--out=/proc/nothing/here/grid.png"], "cannot be written"),
        (["--guidence=3"], "guidance"),
    ],
)
def test_mistakes_are_one_line_before_compiling(flags, message, workdir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dip_jax.sampling.trajectories._draw", None)
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'samples.npz'}", *flags]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("dip_jax sample: ") and message in last


def test_missing_checkpoint_and_changed_settings(workdir, tmp_path, capfd):
    out = tmp_path / "samples.npz"
    assert main(["sample", f"--workdir={tmp_path / 'nowhere'}", f"--out={out}"]) == 2
    assert main(["sample", f"--workdir={workdir}", "--num_samples=8", f"--out={out}"]) == 0
    before = out.read_bytes()
    assert main(["sample", f"--workdir={workdir}", "--num_samples=8", "--seed=1", f"--out={out}"]) == 2
    assert "seed: 0 -> 1" in capfd.readouterr().err and out.read_bytes() == before
