"""`python -m dip_jax sample` as its user meets it: pictures, files, mistakes in one line. Kills are in test_sample_hosts.py."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
import small_data
from PIL import Image

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint, directories, manifest
from dip_jax.errors import UserError
from dip_jax.jobs import sample as job
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
        (["--labels=cat"], "--labels: 'cat' names no class of this model, 'class 0' .. 'class 3' (0..3)"),
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


OTHER_KINDS = [
    *(
        (f"--out={{tmp}}/x{suffix}", f"not as {suffix.lower()}")
        for suffix in (".jpg", ".JPEG", ".webp", ".gif", ".zip", ".npy")
    ),
    ("--out={tmp}/folder.png", "is a directory where a file is to be written"),
    ("--out={tmp}/folder.NPZ", "is a directory where a file is to be written"),
    ("--out={tmp}/file", "is a file where a directory is to be made"),
    ("--trajectory={tmp}/steps.jpg", "--trajectory={tmp}/steps.jpg must end in .png"),
    ("--trajectory={tmp}/folder.png", "is a directory where a file is to be written"),
]


@pytest.mark.parametrize(("flag", "message"), OTHER_KINDS, ids=lambda text: text.replace("{tmp}/", ""))
def test_outputs_of_another_kind_are_refused_before_any_work(flag, message, workdir, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dip_jax.checkpoints.directories.find", None)
    for folder in ("folder.png", "folder.NPZ"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path}/s.npz", flag.format(tmp=tmp_path)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message.format(tmp=tmp_path) in line and sorted(tmp_path.rglob("*")) == before


def test_capitals_do_not_matter(workdir, tmp_path):
    base = ["sample", f"--workdir={workdir}", "--num_samples=4"]
    assert main([*base, f"--out={tmp_path / 'GRID.PNG'}", f"--trajectory={tmp_path / 'STEPS.PNG'}"]) == 0
    assert main([*base, f"--out={tmp_path / 'S.NPZ'}"]) == 0
    assert (tmp_path / "GRID.PNG").read_bytes()[:4] == (tmp_path / "STEPS.PNG").read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "S.NPZ") as file:
        assert len(file["arr_0"]) == 4


NAMED = {"Dog": 2, "dog": 2, "DOG": 2, "Cat": 3, "cat": 1, "3": 3, "7": 7}


@pytest.mark.parametrize("text", NAMED)
def test_classes_go_by_name_too(text):
    assert (
        job._class_of(text, ["7", "cat", "Dog", "Cat"]) == NAMED[text]
    )  # a number is a number, also where a class has that name


@pytest.mark.parametrize(
    ("text", "message"), [("CAT", "names no class"), ("dgo", "did you mean 'dog'?"), ("", "names no class")]
)
def test_a_name_of_no_or_several_classes(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        job._class_of(text, ["cat", "Cat", "dog"])


def test_names_come_from_the_dataset_of_the_run(workdir, tmp_path):
    small_data.write_dataset(tmp_path / "data", 8, size=16, classes=4)
    run = checkpoint.read_record(directories.find(workdir, verify=False, report=print)).config
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, path=str(tmp_path / "data")))
    params = jax.jit(dip.from_config(run.model).init)(jax.random.key(1))
    checkpoint.write_weights(tmp_path / "named", params, config=run)
    out = tmp_path / "samples.npz"
    assert main(["sample", f"--workdir={tmp_path / 'named'}", "--labels=class_3,1", "--num_samples=4", f"--out={out}"]) == 0
    with np.load(out) as file:
        assert file["arr_1"].tolist() == [3, 1, 3, 1]


def test_the_console_says_the_protocol_in_short_lines(workdir, tmp_path, capfd):
    assert main(["sample", f"--workdir={workdir}", "--num_samples=4", f"--out={tmp_path / 's.npz'}"]) == 0
    lines = capfd.readouterr().err.splitlines()[:6]
    assert lines[:5] == [
        "drawing   4 images of 16x16",
        "weights   ema, step 7, float32",
        "solver    euler, 3 steps, 3 + 0 network evaluations each",
        "guidance  1, where 0.11 < t < 0.97",
        "seed      0",
    ]


def test_missing_checkpoint_and_changed_settings(workdir, tmp_path, capfd):
    out = tmp_path / "samples.npz"
    assert main(["sample", f"--workdir={tmp_path / 'nowhere'}", f"--out={out}"]) == 2
    assert main(["sample", f"--workdir={workdir}", "--num_samples=8", f"--out={out}"]) == 0
    before = out.read_bytes()
    assert main(["sample", f"--workdir={workdir}", "--num_samples=8", "--seed=1", f"--out={out}"]) == 2
    assert "seed: 0 -> 1" in capfd.readouterr().err and out.read_bytes() == before
