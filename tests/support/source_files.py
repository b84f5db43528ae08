"""The same images as every kind of source holds them."""

import csv
import io
import json
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Sequence

import numpy as np
from pictures import encoded, photograph
from PIL import Image

CLASSES = ("Käse", "n01440764", "花")

Files = Sequence[tuple[str, str, bytes]]  # class, file name, bytes; sorted by class and name


def generate(count: int, *, size=(60, 45)) -> Files:
    """All different: JPEG, PNG, WebP, grey, RGBA and CMYK in turns, with names that are not ASCII."""
    base, files = np.asarray(photograph(*size)), []
    for i in range(count):
        image = Image.fromarray(np.roll(base, i, axis=1) ^ np.uint8(i % 251))
        kinds = {
            "a.jpg": lambda image=image: encoded(image, "JPEG", quality=90),
            "b.png": lambda image=image: encoded(image, "PNG", compress_level=1),
            "c.webp": lambda image=image: encoded(image, "WEBP", quality=80),
            "grau.png": lambda image=image: encoded(image.convert("L"), "PNG"),
            "d.PNG": lambda image=image: encoded(image.convert("RGBA"), "PNG", compress_level=1),
            "cmyk.JPEG": lambda image=image: encoded(image.convert("CMYK"), "JPEG"),
        }
        ending = list(kinds)[i % len(kinds)]
        files.append((CLASSES[i % len(CLASSES)], f"{i:05d}_ü_{ending}", kinds[ending]()))
    return sorted(files)


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_folder(files: Files, folder: pathlib.Path) -> pathlib.Path:
    for label, name, data in files:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / name).write_bytes(data)
    return folder


def write_csv(files: Files, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "label"))
        for label, name, data in files:
            (folder / name).write_bytes(data)
            writer.writerow((name, label))
    return folder / "labels.csv"


def write_zip(files: Files, folder: pathlib.Path) -> pathlib.Path:
    """Stored and deflated members, shuffled, in one folder as a person packs it."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for i in np.random.default_rng(0).permutation(len(files)):
            label, name, data = files[i]
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2]
            archive.writestr(f"photos/{label}/{name}", data, compress_type=method)
        archive.writestr("__MACOSX/photos/._x.jpg", b"no image")
    return folder / "photos.zip"


def write_parquet(files: Files, folder: pathlib.Path, *, rows: int = 7) -> pathlib.Path:
    """Hugging Face's layout: two files, row groups of so many rows."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    kinds = {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "label": pyarrow.int64()}
    schema = pyarrow.schema(kinds, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    half = len(files) // 2
    for k, part in enumerate((files[:half], files[half:])):
        values = {
            "image": [{"bytes": data, "path": name} for _, name, data in part],
            "label": [CLASSES.index(label) for label, _, _ in part],
        }
        table = pyarrow.table(values, schema=schema)
        parquet.write_table(table, folder / f"train-{k:05d}-of-00002.parquet", row_group_size=rows)
    return folder


def write_webdataset(files: Files, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    half = len(files) // 2
    for k, part in enumerate((files[:half], files[half:])):
        with tarfile.open(folder / f"train-{k:06d}.tar", "w") as tar:
            for label, name, data in part:
                add_to_tar(tar, f"{pathlib.Path(name).stem}.cls", label.encode())
                add_to_tar(tar, name, data)
    return folder


def write_imagenet_tar(files: Files, folder: pathlib.Path) -> pathlib.Path:
    """A tar of one tar per class, neither in order."""
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in reversed(CLASSES):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for label, name, data in reversed(files):
                    if label == synset:
                        add_to_tar(inner, name, data)
            add_to_tar(outer, f"{synset}.tar", buffer.getvalue())
    return folder / "ILSVRC2012_img_train.tar"


WRITERS: dict[str, Callable[[Files, pathlib.Path], pathlib.Path]] = {
    "folder": write_folder,
    "csv": write_csv,
    "zip": write_zip,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "imagenet_tar": write_imagenet_tar,
}
