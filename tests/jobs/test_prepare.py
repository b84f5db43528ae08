"""`prepare`: folders, TFDS, the photographs; bad images, kills, restarts."""

import contextlib
import csv
import hashlib
import io
import json
import pathlib
import subprocess
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import adm_crop, bad_kinds, encoded, good_kinds, photograph
from PIL import Image
from places import ROOT
from preparing import command, content, make_folder

from dip_jax.data import images, photo_crops, prepared, shards, sources, writing
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.jobs.prepare import prepare


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "RECORDS_PER_SHARD", 5)


def test_a_folder_becomes_a_dataset(tmp_path, small_shards):
    root = make_folder(tmp_path / "images")
    summary = prepare("folder", root=str(root), image_size=32, out=tmp_path / "out", processes=2)
    assert summary.records == {"train": 12} and summary.rejected == []
    dataset = prepared.open_dataset(tmp_path / "out")
    assert dataset.classes == ["ants", "bees", "cats"] and dataset.info.class_counts == (4, 4, 4)
    assert [shard.records for shard in dataset.info.shards] == [4, 4, 4]
    files = sorted(root.rglob("*.png"))
    for i, path in enumerate(files):
        expected = adm_crop(np.asarray(Image.open(path)), 32)
        np.testing.assert_array_equal(dataset[i]["image"], expected)
        assert dataset.classes[dataset[i]["label"]] == path.parent.name
    for shard in dataset.info.shards:
        assert hashlib.sha256((tmp_path / "out" / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


@pytest.mark.parametrize("encoding", images.ENCODINGS)
def test_every_encoding_reads_back(tmp_path, encoding):
    root = make_folder(tmp_path / "images", per_class=1)
    size = None if encoding == "original" else 32
    prepare("folder", root=str(root), encoding=encoding, image_size=size, out=tmp_path / "out", processes=1)
    dataset = prepared.open_dataset(tmp_path / "out", image_size=32)
    assert dataset.info.encoding == encoding
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        expected = adm_crop(np.asarray(Image.open(path)), 32)
        if encoding == "jpeg":
            assert np.abs(dataset[i]["image"].astype(float) - expected).mean() < 4
        else:
            np.testing.assert_array_equal(dataset[i]["image"], expected)
    if encoding == "original":
        with pytest.raises(UserError, match="image_size"):
            prepared.open_dataset(tmp_path / "out")


def test_imagenet_synsets_take_their_standard_labels(tmp_path):
    """Sorted synsets are labels 0-999: TFDS's list, in the standard order, is sorted."""
    names = (pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012/labels.txt").read_text().split()
    chosen = [names[k] for k in (0, 207, 360, 999)]
    assert chosen == ["n01440764", "n02099601", "n02444819", "n15075141"] and sorted(names) == names
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_1.JPEG").write_bytes(name.encode())
    split = sources.open_folder("", str(tmp_path), None, tmp_path)["train"]
    assert split.classes == names and (split[207].data, split[207].label) == (names[207].encode(), 207)


def test_train_and_val_folders_become_splits(tmp_path):
    for name in ("train", "val"):
        make_folder(tmp_path / "images" / name, per_class=2)
    summary = prepare("folder", root=str(tmp_path / "images"), image_size=16, out=tmp_path / "out", processes=1)
    assert summary.records == {"train": 6, "validation": 6}
    assert len(prepared.open_dataset(tmp_path / "out")) == len(prepared.open_dataset(tmp_path / "out" / "validation")) == 6
    make_folder(tmp_path / "images" / "val" / "more", classes=("dogs",))
    with pytest.raises(UserError, match="the class 'more'"):
        prepare("folder", root=str(tmp_path / "images"), image_size=16, out=tmp_path / "again", processes=1)


def test_every_odd_image_is_converted_or_listed(tmp_path):
    good, bad = good_kinds(), bad_kinds()
    root = tmp_path / "images"
    for label, kinds in (("bad", bad), ("good", good)):
        (root / label).mkdir(parents=True)
        for kind, (data, *_) in kinds.items():
            (root / label / f"{kind}.jpg").write_bytes(data)  # most extensions are wrong
    (root / "good" / "nested").mkdir()
    (root / "good" / "nested" / "deep.png").write_bytes(good["png"][0])
    (root / "good" / ".hidden").write_bytes(b"no image")
    with pytest.raises(Interrupted, match=rf"{len(bad)} of {len(good) + 1 + len(bad)} images are bad, more than") as stop:
        prepare("folder", root=str(root), image_size=32, out=tmp_path / "out", processes=1)
    assert stop.value.code == Exit.REJECTED_INPUTS
    assert not (tmp_path / "out").exists()
    started = time.monotonic()
    summary = prepare("folder", root=str(root), image_size=32, out=tmp_path / "out", processes=1, max_rejected=0.5)
    assert time.monotonic() - started < 2  # nothing was done again
    assert {pathlib.Path(name).stem for _, name, _ in summary.rejected} == set(bad)
    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in rows] == summary.rejected
    assert all(row["split"] == "train" and row["reason"] for row in rows)
    dataset = prepared.open_dataset(tmp_path / "out")
    expected = {kind: adm_crop(pixels, 32) for kind, (_, pixels) in good.items()}
    assert len(dataset) == len(good) + 1
    for i, name in enumerate(sorted([*(f"{kind}.jpg" for kind in good), "nested/deep.png"])):
        kind = "png" if name.startswith("nested") else name.removesuffix(".jpg")
        np.testing.assert_array_equal(dataset[i]["image"], expected[kind], err_msg=name)
        assert dataset.classes[dataset[i]["label"]] == "good"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": "foldr"}, "--source=foldr is unknown.*did you mean 'folder'"),
        ({}, "needs --from=DIR"),
        ({"root": "nowhere"}, "--from=nowhere is not a folder"),
        ({"root": "empty"}, "no sub-folders"),
        ({"root": "hollow"}, "no images in them"),
        ({"root": "images", "image_size": None}, "--image_size=N"),
        ({"root": "images", "image_size": -3}, "--image_size=-3 must be positive"),
        ({"root": "images", "out": "images"}, "exists and is no dataset"),
        ({"root": "images", "out": "/"}, "exists and is no dataset"),
        ({"root": "images", "out": "images/ants/000.png/x"}, "cannot write"),
        ({"source": "tfds:"}, "needs a name"),
        ({"source": "tfds:no_such_dataset"}, "no_such_dataset"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", per_class=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "class").mkdir(parents=True)
    with pytest.raises(UserError, match=message) as error:
        prepare(**{"source": "folder", "image_size": 16, "out": "out"} | arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_dataset_is_left_alone(tmp_path):
    root = make_folder(tmp_path / "images", per_class=1)
    arguments = {"root": str(root), "image_size": 16, "out": tmp_path / "out", "processes": 1}
    first = prepare("folder", **arguments)
    before = content(tmp_path / "out")
    assert prepare("folder", **arguments) == first and content(tmp_path / "out") == before
    with pytest.raises(UserError, match="exists with image_size=16 where 8 is asked"):
        prepare("folder", **arguments | {"image_size": 8})
    with pytest.raises(UserError, match="exists with encoding=tiff where png is asked"):
        prepare("folder", **arguments | {"encoding": "png"})


@pytest.mark.parametrize("finished", [False, True])
def test_what_was_begun_in_an_encoding_goes_on_in_it(tmp_path, small_shards, monkeypatch, finished):
    root = make_folder(tmp_path / "images")
    arguments = {"root": str(root), "image_size": 16, "out": tmp_path / "out", "processes": 1}
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(writing, "finish", lambda *_, **__: 1 / 0)
        with contextlib.nullcontext() if finished else pytest.raises(ZeroDivisionError):
            prepare("folder", **arguments, encoding="png")
    prepare("folder", **arguments)
    assert prepared.open_dataset(tmp_path / "out").info.encoding == "png"


@pytest.mark.parametrize("encoding", [None, "tiff"])
@pytest.mark.parametrize("text", ["[1]", "{"])
@pytest.mark.parametrize("name", ["out/dataset.json", "out.partial/request.json"])
def test_damage_in_what_is_there_is_one_line(tmp_path, name, text, encoding):
    root = make_folder(tmp_path / "images", per_class=1)
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(UserError, match=r"json is damaged \(") as error:
        prepare("folder", root=str(root), image_size=16, out=tmp_path / "out", processes=1, encoding=encoding)
    assert "\n" not in str(error.value) and file.read_text() == text


@pytest.mark.parametrize("encoding", [None, "tiff"])
def test_a_request_that_cannot_be_read_is_not_replaced(tmp_path, monkeypatch, encoding):
    root = make_folder(tmp_path / "images", per_class=1)
    file = tmp_path / "out.partial" / "request.json"
    file.parent.mkdir()
    file.write_bytes(b"{}")
    read = pathlib.Path.read_text

    def refuse(path, *args, **kwargs):
        if path == file:
            raise PermissionError(13, "Permission denied", str(file))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"Permission denied: .*request\.json"):
        prepare("folder", root=str(root), image_size=16, out=tmp_path / "out", processes=1, encoding=encoding)
    assert file.read_bytes() == b"{}"


def test_unfinished_work_of_another_request_is_not_mixed_in(tmp_path):
    root = make_folder(tmp_path / "images", per_class=1)
    (root / "ants" / "bad.png").write_bytes(b"")
    arguments = {"root": str(root), "out": tmp_path / "out", "processes": 1}
    with pytest.raises(Interrupted):
        prepare("folder", image_size=16, **arguments)
    with pytest.raises(UserError, match="image_size=16 where now image_size=8"):
        prepare("folder", image_size=8, **arguments)
    (root / "ants" / "bad.png").unlink()
    with pytest.raises(
        UserError, match=r"a source that has changed since: 1 removed \(ants/bad.png\): remove it to start afresh"
    ):
        prepare("folder", image_size=16, **arguments)


def test_finished_shards_are_not_written_again(tmp_path, small_shards, monkeypatch):
    root = make_folder(tmp_path / "images")
    (root / "ants" / "bad.png").write_bytes(b"")
    arguments = {"root": str(root), "image_size": 16, "out": tmp_path / "out", "processes": 1}
    with pytest.raises(Interrupted):
        prepare("folder", **arguments)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "dataset").glob("*.array_record")}
    lost = next((tmp_path / "out.partial" / "reports" / "train").iterdir())
    lost.unlink()
    prepare("folder", **arguments, max_rejected=0.5)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert {name for name in after if after[name] != before[name]} == {lost.name.removesuffix(".json")}


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset that needs no TensorFlow to build: it yields encoded bytes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": encoded(photograph(40 + i, 30), "JPEG"), "label": i % 2}


class ArrayPhotos(TinyPhotos):
    """One that yields arrays, which TFDS encodes with TensorFlow."""

    def _generate_examples(self, count):
        yield 0, {"image": np.zeros((8, 8, 3), np.uint8), "label": 0}


class OnlyNumbers(TinyPhotos):
    """One without images."""

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"x": np.int64}))


def test_any_tfds_classification_set(tmp_path):
    summary = prepare("tfds:tiny_photos", root=str(tmp_path / "tfds"), image_size=24, out=tmp_path / "out", processes=1)
    assert summary.records == {"test": 4, "train": 6}
    dataset = prepared.open_dataset(tmp_path / "out")
    builder = tfds.builder("tiny_photos", data_dir=tmp_path / "tfds", file_format="array_record")
    for i, example in enumerate(builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})):
        expected = adm_crop(np.asarray(Image.open(io.BytesIO(example["image"]))), 24)
        np.testing.assert_array_equal(dataset[i]["image"], expected)
        assert dataset[i]["label"] == example["label"]
    assert dataset.classes == ["a", "b"]


def test_a_tfds_folder_of_another_format_and_another_one(tmp_path):
    arguments = {"image_size": 24, "out": tmp_path / "out", "processes": 1}
    prepare("tfds:tiny_photos", root=str(tmp_path / "tfds"), image_size=24, out=tmp_path / "first", processes=1)
    (file,) = (tmp_path / "tfds").rglob("dataset_info.json")
    file.write_text(file.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        UserError, match="holds tiny_photos as tfrecord files, not array_record: give another data_dir as --from"
    ):
        prepare("tfds:tiny_photos", root=str(tmp_path / "tfds"), **arguments)
    assert prepare("tfds:tiny_photos", root=str(tmp_path / "another"), **arguments).records == {"test": 4, "train": 6}


def test_what_tfds_cannot_do_here_is_said(tmp_path):
    arguments = {"root": str(tmp_path / "tfds"), "image_size": 24, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"TFDS builds array_photos with packages .*download_and_prepare"):
        prepare("tfds:array_photos", **arguments)
    with pytest.raises(UserError, match="only_numbers has the features x"):
        prepare("tfds:only_numbers", **arguments)


def test_photo_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_crops, "SPLITS", {"train": (0, 40), "validation": (1, 20)})
    summary = prepare("photo_crops", out=tmp_path / "out", processes=1)
    assert summary.records == {"train": 40, "validation": 20}
    dataset = prepared.open_dataset(tmp_path / "out")
    assert dataset.classes == list(photo_crops.PHOTOGRAPHS) and dataset.info.class_counts == (4,) * 10
    assert (dataset.info.encoding, dataset.image_size) == ("raw", 64)
    crops = {np.asarray(photo_crops.Cropper(64).crop(0, i)).tobytes(): i % 10 for i in range(40)}
    assert {(dataset[i]["image"].tobytes(), dataset[i]["label"]) for i in range(40)} == set(crops.items())


def test_the_command(tmp_path):
    root = make_folder(tmp_path / "images", per_class=1)
    result = subprocess.run(command(root, tmp_path / "out"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and f"{tmp_path / 'out'}: 3 train images" in result.stdout
    (root / "ants" / "bad.png").write_bytes(b"")
    result = subprocess.run(command(root, tmp_path / "two"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == Exit.REJECTED_INPUTS and "Traceback" not in result.stderr
    info = json.loads((tmp_path / "out" / shards.DATASET_FILE).read_text())
    assert info["classes"] == ["ants", "bees", "cats"] and info["num_records"] == 3 and len(info["fingerprint"]) == 64
