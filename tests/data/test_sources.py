"""The same images from every kind of source; archives and tables as hostile or careless people make them."""

import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pyarrow
import pytest
from pictures import encoded, photograph
from places import ROOT
from pyarrow import parquet
from source_files import CLASSES, WRITERS, add_to_tar, generate, write_webdataset

from dip_jax.data import sources
from dip_jax.data.sources.split import identity
from dip_jax.errors import UserError
from dip_jax.jobs.prepare import prepare

JPEG = encoded(photograph(40, 30), "JPEG")


@pytest.fixture(scope="module")
def files():
    return generate(300)


@pytest.fixture(scope="module")
def places(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {source: write(files, root / source) for source, write in WRITERS.items()}


def open_source(kind: str, path, argument: str = ""):
    return sources.SOURCES[kind].open(argument, str(path), None, path)


def items(split) -> list[sources.Item]:
    return [split[i] for i in range(len(split))]


def test_every_source_of_the_table_has_a_writer():
    assert set(WRITERS) == set(sources.SOURCES) - {"tfds", "photo_crops"}  # which have tests of their own


def test_the_readme_has_a_command_for_every_source():
    text = (ROOT / "README.md").read_text()
    assert all(f"--source={source}" in text for source in set(sources.SOURCES) - {"photo_crops"})


@pytest.mark.parametrize("source", WRITERS)
def test_every_source_gives_the_same_images(files, places, source):
    (split,) = open_source(source, places[source]).values()
    assert isinstance(split, sources.Split) and split.classes == list(CLASSES)
    assert [(item.data, item.label, item.problem) for item in items(split)] == [
        (data, CLASSES.index(label), "") for label, _, data in files
    ]
    # In parts, sent to another process, read from the middle and backwards.
    part = pickle.loads(pickle.dumps(split.part(120, 180)))
    assert len(part) == 60 and len(pickle.dumps(part)) < 20_000
    assert [part[i] for i in (31, 32, 5, 59)] == [split[i] for i in (151, 152, 125, 179)]
    assert identity(open_source(source, places[source])["train"]) == identity(split)


@pytest.mark.slow
def test_every_source_becomes_the_same_dataset(places, tmp_path):
    fingerprints = {}
    for source, place in places.items():
        out = tmp_path / source
        prepare(source, root=str(place), image_size=32, out=out)
        fingerprints[source] = json.loads((out / "dataset.json").read_text())["fingerprint"]
    assert len(set(fingerprints.values())) == 1, fingerprints


# ------------------------------------------------------------------------------------------------ tar


def make_tar(path, members: dict[str, bytes | tarfile.TarInfo]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                tar.addfile(data)
            else:
                add_to_tar(tar, name, data)
    return path


def linked(target: str, kind=tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def test_hostile_members_of_a_tar_are_listed_and_nothing_is_written(tmp_path):
    inside = {
        "../../evil.jpg": JPEG,
        "../../evil.cls": b"0",
        "link.jpg": linked("/etc/passwd"),
        "link.cls": b"1",
        "hard.jpg": linked("../../evil.jpg", tarfile.LNKTYPE),
        "hard.cls": b"1",
        "device.jpg": linked("", tarfile.CHRTYPE),
        "device.cls": b"1",
        "unlabelled.jpg": JPEG,
        "damaged.jpg": JPEG,
        "damaged.json": b"[" * 50_000,
        "negative.jpg": JPEG,
        "negative.cls": b"-1",
        "labelled.jpg": JPEG,
        "labelled.json": b'{"label": 1, "width": 40}',
        "only_text.txt": b"",
    }
    (split,) = open_source("webdataset", make_tar(tmp_path / "train.tar", inside)).values()
    found = {item.name.removeprefix("train.tar/"): item for item in items(split)}
    assert split.classes == ["0", "1"] and split.notes == ["left out: 1 sample without an image (train.tar/only_text)"]
    assert {name for name, item in found.items() if not item.problem} == {"../../evil.jpg", "labelled.jpg"}
    assert found["labelled.jpg"].data == JPEG and found["labelled.jpg"].label == 1
    for name in ("link.jpg", "hard.jpg", "device.jpg"):
        assert "not a plain file" in found[name].problem and not found[name].data
    for name in ("unlabelled.jpg", "damaged.jpg", "negative.jpg"):
        assert "no label" in found[name].problem
    assert os.listdir(tmp_path) == ["train.tar"] and not (tmp_path.parent.parent / "evil.jpg").exists()


def wild_size(data: bytes) -> bytes:
    """The first member says that it has a terabyte."""
    header = bytearray(data[:512])
    header[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:700], r"damaged one \("),
        (lambda data: data[:1024], "no end mark"),
        (lambda data: data[:1024] + b"x" * 512 + data[1024:], "no end mark"),
        (lambda data: b"\x1f\x8b" + data, "gunzip it first"),
        (lambda data: b"", r"damaged one \(empty file"),
        (lambda data: b"no tar at all" * 100, "damaged one"),
        (wild_size, "ends beyond the end"),
    ],
)
@pytest.mark.parametrize("source", ["webdataset", "imagenet_tar"])
def test_damaged_tars_are_one_line(tmp_path, source, damage, message):
    whole = make_tar(tmp_path / "train.tar", {"a.jpg": JPEG[:400], "a.cls": b"0"}).read_bytes()
    (tmp_path / "train.tar").write_bytes(damage(whole))
    with pytest.raises(UserError, match=message) as error:
        open_source(source, tmp_path / "train.tar")
    assert "\n" not in str(error.value)


def test_an_inner_tar_that_is_cut_off_does_not_run_into_the_next(tmp_path):
    inner = make_tar(tmp_path / "inner.tar", {"a.jpg": JPEG}).read_bytes()
    make_tar(tmp_path / "imagenet.tar", {"n1.tar": inner[:1024], "n2.tar": inner})
    with pytest.raises(UserError, match="damaged one"):
        open_source("imagenet_tar", tmp_path / "imagenet.tar")
    make_tar(tmp_path / "imagenet.tar", {"n1.tar": inner, "n2.tar": inner})
    split = open_source("imagenet_tar", tmp_path / "imagenet.tar")["train"]
    assert [item.name for item in items(split)] == ["n1/a.jpg", "n2/a.jpg"]
    assert split.notes == ["2 synsets where ImageNet has 1000: other labels than its own"]


def test_webdataset_numbers_are_labels_and_splits_are_names(tmp_path):
    folder = tmp_path / "wds"
    folder.mkdir()
    (folder / "classnames.txt").write_text("tench\ngoldfish\nshark\n")
    for split, labels in {"train": (1, 0), "validation": (1,)}.items():
        make_tar(
            folder / f"imagenet-{split}-0000.tar",
            {f"{k}.{suffix}": data for k, n in enumerate(labels) for suffix, data in (("jpg", JPEG), ("cls", str(n).encode()))},
        )
    found = open_source("webdataset", folder)
    assert {name: [item.label for item in items(split)] for name, split in found.items()} == {
        "train": [1, 0],
        "validation": [1],
    }
    assert found["train"].classes == ["tench", "goldfish", "shark"]
    (folder / "classnames.txt").write_text("tench\n")
    with pytest.raises(UserError, match="has 1 lines for labels up to 1"):
        open_source("webdataset", folder)


# ------------------------------------------------------------------------------------------------ zip


def make_zip(path, members: dict[str, bytes], **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_hostile_members_of_a_zip_are_passed_over_or_listed(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cats/1.jpg", "../../evil.jpg", "/etc/evil.jpg", "__MACOSX/cats/._1.jpg", "cats/notes.txt", "loose.jpg"):
            archive.writestr(name, JPEG)
        archive.writestr("dogs/bzip2.jpg", JPEG, compress_type=zipfile.ZIP_BZIP2)
        link = zipfile.ZipInfo("cats/link.jpg")
        link.external_attr = 0xA1FF << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("empty/", "")
    (split,) = open_source("zip", path).values()
    assert split.classes == ["cats", "dogs"] and [item.name for item in items(split)] == ["cats/1.jpg", "dogs/bzip2.jpg"]
    assert split[0].data == JPEG and "method 12" in split[1].problem
    assert split.notes == [
        "no class: 1 sub-folder without an image (empty)",
        "left out: 1 image outside the class folders (loose.jpg)",
        "left out: 1 file that is no image by its name (cats/notes.txt)",
        "left out: 1 hidden or system file (__MACOSX)",
        "passed over: 1 link that leads nowhere or in a circle (cats/link.jpg)",
        "passed over: 2 names that lead out of the archive (../../evil.jpg, /etc/evil.jpg)",
    ]
    assert os.listdir(tmp_path) == ["photos.zip"]


def patched(path, find: bytes, offset: int, value: bytes) -> None:
    """Writes `value` so many bytes after each occurrence of `find`."""
    data = bytearray(path.read_bytes())
    place = data.find(find)
    while place >= 0:
        data[place + offset : place + offset + len(value)] = value
        place = data.find(find, place + 1)
    path.write_bytes(data)


def test_a_member_larger_than_it_says_is_not_unpacked(tmp_path):
    path = make_zip(tmp_path / "bomb.zip", {"cats/1.jpg": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    patched(path, b"PK\x01\x02", 24, struct.pack("<I", 1000))
    (split,) = open_source("zip", path).values()
    tracemalloc.start()
    try:
        assert split[0].problem == "damaged zip member (wrong checksum)"
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    patched(path, b"PK\x01\x02", 24, struct.pack("<I", 3 << 30))
    assert "too many for an image" in open_source("zip", path)["train"][0].problem


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: patched(path, b"PK\x01\x02", 8, b"\1\0"), "is encrypted .*with its password"),
        (lambda path: patched(path, b"PK\x01\x02", 20, struct.pack("<I", 1 << 20)), "zip bomb"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read as a zip"),
        (lambda path: path.write_bytes(b"x"), "cannot be read as a zip"),
    ],
)
def test_zips_that_cannot_be_read_are_one_line(tmp_path, damage, message):
    path = make_zip(tmp_path / "photos.zip", {"cats/1.jpg": JPEG})
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        open_source("zip", path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_listed_and_the_next_is_read(tmp_path, method):
    path = make_zip(tmp_path / "photos.zip", {"cats/1.jpg": JPEG, "cats/2.jpg": JPEG}, compression=method)
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    split = open_source("zip", path)["train"]
    assert "damaged zip member" in split[0].problem and split[1].data == JPEG


def test_macs_and_windows_pack_names_in_their_own_ways(tmp_path):
    path = make_zip(tmp_path / "photos.zip", {"K\u00e4se/1.jpg": JPEG, "dogs\\2.jpg": JPEG})
    patched(path, b"PK\x01\x02", 8, b"\0\0")  # UTF-8, but without the flag that says so
    assert open_source("zip", path)["train"].classes == ["K\u00e4se", "dogs"]


# ------------------------------------------------------------------------------------------------ parquet


def write_rows(path, columns: dict, *, features: dict | None = None) -> None:
    table = pyarrow.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=2)


def test_labels_may_be_numbers_or_names_and_splits_without_any_are_left_out(tmp_path):
    image = pyarrow.array([JPEG, JPEG, None])
    write_rows(tmp_path / "train.parquet", {"image": image, "label": ["dog", "cat", "cat"]})
    (split,) = open_source("parquet", tmp_path).values()
    assert split.classes == ["cat", "dog"] and [item.label for item in items(split)] == [1, 0, -1]
    assert split[2].problem == "no bytes in the row" and split[2].name == "train.parquet[2]"
    for name, labels in {"train": [2, 0, None], "test": [-1, -1, -1]}.items():
        write_rows(tmp_path / f"{name}.parquet", {"image": image, "label": labels})
    found = open_source("parquet", tmp_path)
    assert list(found) == ["train"] and found["train"].classes == ["0", "1", "2"]
    assert found["train"].notes == ["left out: the split test, 3 images without labels"]
    assert [item.label for item in items(found["train"])] == [2, 0, -1]


@pytest.mark.parametrize(
    "columns, argument, message",
    [
        ({"image": [JPEG], "fine": [0], "coarse": [0]}, "", r"say which is the label by --source=parquet:COLUMN"),
        ({"image": [JPEG], "fine": [0], "coarse": [0]}, "rough", "say which is the label"),
        ({"text": ["x"], "label": [0]}, "", "one column of images is needed"),
        ({"left": [JPEG], "right": [JPEG], "label": [0]}, "", "one column of images is needed"),
        ({"image": [JPEG], "label": [0.5]}, "", "the label 'label' is double"),
        ({"image": [JPEG], "label": [10**9]}, "", "has the label 1000000000"),
        (
            {"image": pyarrow.array([], pyarrow.binary()), "label": pyarrow.array([], pyarrow.int64())},
            "",
            "no rows with a label",
        ),
    ],
)
def test_tables_without_image_or_label_are_one_line(tmp_path, columns, argument, message):
    write_rows(tmp_path / "train.parquet", columns)
    with pytest.raises(UserError, match=message):
        open_source("parquet", tmp_path, argument)


def test_a_column_can_be_named(tmp_path):
    names = {"fine": {"_type": "ClassLabel", "names": ["rose", "pike"]}, "coarse": {"_type": "ClassLabel", "names": ["fish"]}}
    write_rows(tmp_path / "train.parquet", {"img": [JPEG], "fine": [1], "coarse": [0]}, features=names)
    assert open_source("parquet", tmp_path, "fine")["train"].classes == ["rose", "pike"]


def test_damaged_parquet_is_one_line(tmp_path):
    path = tmp_path / "train.parquet"
    rng = np.random.default_rng(0)
    write_rows(path, {"image": [rng.bytes(5000) for _ in range(4)], "label": [0] * 4})
    whole = path.read_bytes()
    path.write_bytes(b"\xff" * 6000 + whole[6000:])
    with pytest.raises(UserError, match=r"row 0: damaged .*fetch the file again"):
        open_source("parquet", tmp_path)["train"][0]
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_source("parquet", tmp_path)


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install"):
        open_source("parquet", tmp_path)


# ------------------------------------------------------------------------------------------------ csv


@pytest.mark.parametrize(
    "text, classes, labels",
    [
        ("file,label\na.jpg,dog\nb.jpg,cat\n", ["cat", "dog"], [1, 0]),
        ("\ufefffile_name;name\r\na.jpg;dog\r\nb.jpg;cat\r\n", ["cat", "dog"], [1, 0]),
        ("label\tfile\n2\ta.jpg\n0\tb.jpg\n", ["0", "1", "2"], [2, 0]),
        ("file,label,name\na.jpg,1,dog\nb.jpg,0,cat\n", ["cat", "dog"], [1, 0]),
        ('id,file,class\n1,"a.jpg",dog\n2,b.jpg,cat\n', ["cat", "dog"], [1, 0]),
    ],
)
def test_tables_as_people_write_them(tmp_path, text, classes, labels):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "labels.csv").write_bytes(text.encode())
    for place in (tmp_path, tmp_path / "labels.csv"):
        (split,) = open_source("csv", place).values()
        assert split.classes == classes and [(i.data, i.label) for i in items(split)] == [(JPEG, n) for n in labels]


def test_files_that_a_table_names_and_nobody_has_are_listed(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.jpg,0\ngone.jpg,0\n")
    (tmp_path / "a.jpg").write_bytes(JPEG)
    split = open_source("csv", tmp_path)["train"]
    assert (split[0].problem, split[1].problem) == ("", "no such file")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"a.jpg,0\n", r"begins with the columns a.jpg, 0: its first line must name"),
        (b"", "begins with the columns \\(none\\)"),
        (b"file,label\n", "no rows"),
        (b"file,label\na.jpg\n", r"row 2: 'a.jpg' has not a value for each of file, label"),
        (b"file,label\na.jpg,\n", "row 2"),
        (b"file,label\na.jpg,5000000\n", "has the label 5000000"),
        (b"file,label\n\xff.jpg,0\n", "is not UTF-8"),
    ],
)
def test_tables_that_say_too_little_are_one_line(tmp_path, data, message):
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_source("csv", tmp_path)


@pytest.mark.parametrize("source", [*WRITERS])
@pytest.mark.parametrize("place", ["", "nowhere"])
def test_a_source_that_is_not_there_is_one_line(tmp_path, monkeypatch, source, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--from=") as error:
        sources.SOURCES[source].open("", place, None, tmp_path)
    assert "\n" not in str(error.value)


def test_the_samples_of_webdataset_hold_together_by_key(tmp_path, files):
    write_webdataset(files[:6], tmp_path / "wds")
    with tarfile.open(tmp_path / "wds" / "train-000000.tar", "a") as tar:
        add_to_tar(tar, "late.jpg", JPEG)
        add_to_tar(tar, "late.mask.png", b"another kind")
        add_to_tar(tar, "late.cls", CLASSES[0].encode())
    split = open_source("webdataset", tmp_path / "wds")["train"]
    late = [item for item in items(split) if item.name.endswith("late.jpg")]
    assert len(split) == 7 and late == [sources.Item("train-000000.tar/late.jpg", JPEG, 0)]
