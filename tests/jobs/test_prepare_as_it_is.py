"""`prepare` on what people really have: stray files, links in circles, rotated photographs; and what it says of it."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from pictures import encoded, photograph
from PIL import Image
from places import ROOT
from preparing import make_folder

import dip_jax
from dip_jax import __main__
from dip_jax.data import prepared, shards, summary, workers, writing
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.jobs import train
from dip_jax.jobs.prepare import prepare
from dip_jax.runtime import command_line

# What a camera writes for a picture that it was held in these ways; the pixels are then stored turned back.
HELD = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.fixture
def album(tmp_path) -> pathlib.Path:
    """66 photographs of a person who keeps them as one does."""
    root = make_folder(tmp_path / "album", classes=("cats", "dogs"), per_class=30)
    for i, (orientation, turn) in enumerate(HELD.items()):
        stored = photograph(60, 45).transpose(turn)
        (root / "cats" / f"phone_{i}.jpg").write_bytes(encoded(stored, "JPEG", quality=95, exif=exif(orientation)))
    deep = root / "cats" / "/".join("abcdefgh" * 40)  # 320 folders
    deep.mkdir(parents=True)
    (deep / "deep.png").write_bytes((root / "cats" / "000.png").read_bytes())
    (root / "dogs" / "one.webp").write_bytes(encoded(photograph(60, 45), "WEBP"))
    (root / "solo").mkdir()
    (root / "solo" / "only.PNG").write_bytes(encoded(photograph(50, 50), "PNG"))
    (root / "cats" / "notes.txt").write_text("not an image")
    (root / ".DS_Store").write_bytes(b"\0")
    (root / "dogs" / "Thumbs.db").write_bytes(b"\0")
    (root / "__MACOSX" / "cats").mkdir(parents=True)
    (root / "__MACOSX" / "cats" / "._000.png").write_bytes(b"\0")
    (root / "empty").mkdir()
    (root / "loose.jpg").write_bytes(encoded(photograph(60, 45), "JPEG"))
    (root / "cats" / "loop").symlink_to(root)
    (root / "dogs" / "self").symlink_to("self")
    (root / "dogs" / "gone.jpg").symlink_to("nowhere.jpg")
    return root


def test_a_folder_as_it_is(album, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["prepare", f"--from={album}", "--source=folder", "--image_size=48", "--out=out", "--processes=1"]
    assert __main__.main(argv) == Exit.DONE
    *said, following = capsys.readouterr().out.splitlines()
    assert said == [
        "out: 66 train images",
        "3 classes: fewest 1 (solo), most 34 (cats)",
        "stored: tiff, 48x48 pixels",
        "no class: 1 sub-folder without an image (empty)",
        "left out: 1 image outside the class folders (loose.jpg)",
        "left out: 1 file that is no image by its name (cats/notes.txt)",
        "left out: 3 hidden or system files (.DS_Store, __MACOSX, dogs/Thumbs.db)",
        "passed over: 3 links that lead nowhere or in a circle (cats/loop, dogs/gone.jpg, dogs/self)",
        "EXIF: 3 images carry a rotation, which is ignored as ADM does; --exif=rotate turns one's own",
        "a look at it: out/preview.png",
    ]
    with Image.open("out/preview.png") as picture:
        assert picture.width > 8 * 48
    dataset = dip_jax.open_dataset("out")
    assert dataset.classes == ["cats", "dogs", "solo"]
    assert repr(dataset) == "Dataset(out: 66 images of 48x48 pixels, 3 classes: cats, dogs, solo)".replace(
        "out", str(dataset.folder)
    )
    assert following.startswith("next: python -m dip_jax train ")
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    train.define_flags(values)
    command_line.parse(values, "train", shlex.split(following)[5:])
    settings = command_line.read_config(values)
    assert (settings.model.num_classes, settings.model.image_size, settings.data.path) == (3, (48, 48), "out")
    assert settings.repa.weight == 0  # nothing that must be fetched first


def test_photographs_are_turned_where_that_is_asked(album, tmp_path):
    arguments = {"root": str(album), "image_size": 45, "processes": 1}
    summaries = {way: prepare("folder", out=tmp_path / way, exif=way, **arguments) for way in ("ignore", "rotate")}
    assert summaries["rotate"].notes[-1] == "EXIF: 3 images turned upright"
    ignored, turned = (prepared.open_dataset(tmp_path / way) for way in ("ignore", "rotate"))
    assert ignored.fingerprint != turned.fingerprint
    files = sorted(
        path.relative_to(album / "cats").as_posix()
        for path in (album / "cats").rglob("*.[pj][np]g")
        if "loop" not in path.parts
    )
    upright = np.asarray(photograph(60, 45))[:, 7:52].astype(float)
    for i, orientation in enumerate(HELD):
        k = files.index(f"phone_{i}.jpg")
        assert np.abs(turned[k]["image"] - upright).mean() < 8, orientation
        assert np.abs(ignored[k]["image"] - upright).mean() > 30, orientation
    assert dataclasses.replace(ignored.info, exif="rotate").fingerprint != ignored.fingerprint
    file = tmp_path / "ignore" / shards.DATASET_FILE
    values = json.loads(file.read_text())
    del values["exif"]  # as in datasets from before there was a choice
    file.write_text(json.dumps(values))
    assert prepared.open_dataset(tmp_path / "ignore").fingerprint == ignored.fingerprint
    with pytest.raises(UserError, match="exists with exif=ignore where rotate is asked"):
        prepare("folder", out=tmp_path / "ignore", exif="rotate", **arguments)
    with pytest.raises(UserError, match="--exif=rotate turns crops, but --encoding=original"):
        prepare("folder", out=tmp_path / "new", exif="rotate", encoding="original", **arguments)


def test_bad_images_are_allowed_by_share_or_number(tmp_path):
    root = make_folder(tmp_path / "images", per_class=1)
    for name in ("bad.png", "worse.png"):
        (root / "ants" / name).write_bytes(b"")
    arguments = {"root": str(root), "image_size": 16, "out": tmp_path / "out", "processes": 1}
    with pytest.raises(
        Interrupted, match=r"2 of 5 images are bad, more than --max_rejected=1 \(the first: ants/bad.png: empty"
    ):
        prepare("folder", max_rejected=1, **arguments)
    with pytest.raises(UserError, match=r"--max_rejected=1\.5 must be a share below 1, or a whole number"):
        prepare("folder", max_rejected=1.5, **arguments)
    made = prepare("folder", max_rejected=2, **arguments)
    assert len(made.rejected) == 2
    (said,) = (line for line in summary.lines(str(tmp_path / "out"), made) if "rejected" in line)
    assert said.startswith("2 of 5 images were rejected, the first ants/bad.png (empty file): ")


def test_a_changed_source_is_told_by_what_changed(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "images", per_class=2)
    arguments = {"root": str(root), "image_size": 16, "out": tmp_path / "out", "processes": 1}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(writing, "finish", lambda *_, **__: 1 / 0)
        prepare("folder", **arguments)
    (root / "ants" / "000.png").rename(root / "ants" / "new.png")
    (root / "bees" / "000.png").write_bytes(b"another size")
    (root / "dogs").mkdir()
    for i in range(4):
        (root / "dogs" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        prepare("folder", **arguments)
    assert (
        "changed since: 1 class added (dogs), 5 added (ants/new.png, dogs/0.png, dogs/1.png, ...), 1 removed (ants/000.png), "
        "1 of other content (bees/000.png): remove it"
    ) in str(error.value)


@pytest.mark.parametrize(
    "files, message",
    [
        (["a.jpg", "b.jpg"], "has 2 images and no sub-folder with images"),
        (["cats/a.txt"], r"has no images by their names \(it has cats/a.txt\)"),
        (["val/cats/a.jpg"], "has val but no train"),
    ],
)
def test_a_folder_without_classes_says_what_it_has(tmp_path, files, message):
    for name in files:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        prepare("folder", root=str(tmp_path / "images"), image_size=16, out=tmp_path / "out")


SCRIPTS = {
    "prepare": """
from dip_jax.jobs.prepare import prepare
prepare("folder", root={root!r}, image_size=16, out={out!r}, processes=2)
""",
    "batches": """
import jax
from dip_jax import config
from dip_jax.data import pipeline, prepared
from dip_jax.runtime import sharding
dataset = prepared.open_dataset({data!r})
data = config.Data(batch_size=2, num_workers=2)
mesh = sharding.make_mesh(config.Mesh())
with jax.set_mesh(mesh), sharding.use_rules(config.Mesh().rules):
    batches = pipeline.batches(dataset, data, mesh=mesh, image_size=16, num_classes=3, seed=0)
    next(batches)
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_a_guard_is_told_so(tmp_path, name):
    root = make_folder(tmp_path / "images", per_class=2)
    if name == "batches":
        prepare("folder", root=str(root), image_size=16, out=tmp_path / "data", processes=1)
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[name].format(root=str(root), out=str(tmp_path / "out"), data=str(tmp_path / "data")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    result = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode and f"UserError: {workers.GUARD}" in result.stderr
    assert result.stderr.count("Traceback") == 1  # the script's own; none of the workers'
    assert "out of memory" not in result.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image_size=0"], "--image_size=0 must be positive"),
        (["--image_size=-3"], "--image_size=-3 must be positive"),
        (["--encoding=original", "--image_size=16"], "--image_size=16 is the side of stored crops, but --encoding=original"),
        (["--image_size=16", "--quality=50"], "--quality=50 is of jpeg crops, and these are tiff: leave it out, or use"),
        (["--image_size=16", "--encoding=png", "--quality=95"], "--quality=95 is of jpeg crops, and these are png"),
        (["--source=photo_crops", "--image_size=0"], "--image_size=0 must be positive"),
    ],
)
def test_what_would_be_passed_over_is_refused(tmp_path, capsys, flags, message):
    ask = ["prepare", "--source=folder", f"--from={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert __main__.main([*ask, *flags]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_dataset_of_originals_is_not_taken_for_one_of_crops(tmp_path, capsys):
    root = make_folder(tmp_path / "images", per_class=1)
    ask = ["prepare", "--source=folder", f"--from={root}", f"--out={tmp_path / 'out'}"]
    assert __main__.main([*ask, "--encoding=original"]) == 0 and __main__.main(ask) == 0  # found again
    capsys.readouterr()
    assert __main__.main([*ask, "--image_size=16"]) == 2
    assert "exists with encoding=original where tiff is asked" in capsys.readouterr().err
