"""Where `prepare` reads from: one row of `SOURCES` per kind of source.

A source opens as splits by name; a split gives encoded images by position, and is cheap to send to another process.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dip_jax.errors import UserError


@dataclass(frozen=True)
class Item:
    """One image of a split as the source holds it."""

    name: str  # what a user finds it by: a file's path, or a record's number
    data: bytes  # any encoding that Pillow reads
    label: int


@runtime_checkable
class Split(Protocol):
    """What `prepare` asks of a split."""

    classes: list[str]
    identity: str  # changes when the source's content does: what a restarted `prepare` compares

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def part(self, start: int, stop: int) -> "Split":
        """The items in [start, stop)."""
        ...


@dataclass(frozen=True)
class Source:
    """A row of `SOURCES`.

    Attributes:
        open: (what follows "NAME:" in --source, --from, image size or None, scratch folder) -> splits by name.
        encoding: what a dataset made from it stores unless --encoding says otherwise.
        image_size: the crop size unless --image_size says otherwise.
    """

    open: Callable[[str, str, int | None, pathlib.Path], Mapping[str, Split]]
    encoding: str = "tiff"
    image_size: int | None = None


@dataclass(frozen=True)
class FolderSplit:
    """A folder with one sub-folder per class (ImageFolder's convention); classes in sorted order.

    ImageNet's synset folders (n01440764, ...) sorted by name are the standard labels 0-999.
    """

    root: pathlib.Path
    classes: list[str]
    files: list[tuple[str, int]]  # path below root, label
    identity: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        name, label = self.files[i]
        return Item(name, (self.root / name).read_bytes(), label)

    def part(self, start: int, stop: int) -> "FolderSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, files=self.files[start:stop])


_SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def open_folder(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, FolderSplit]:
    """The folder as one split; or as several if its sub-folders are all named train, val, validation or test.

    Raises:
        UserError: if there is no such folder, no class in it, or a split with other classes than train.
    """
    del argument, image_size, scratch
    if not root:
        raise UserError("--source=folder needs --from=DIR, a folder with one sub-folder of images per class")
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"--from={root} is not a folder: give a folder with one sub-folder of images per class")
    names = _subfolders(path)
    if not names or not set(names) <= set(_SPLIT_FOLDERS):
        return {"train": _folder_split(path, names)}
    if "train" not in names:
        raise UserError(f"--from={root} has {', '.join(names)} but no train: give the folder whose sub-folders are classes")
    classes = _subfolders(path / "train")
    return {_SPLIT_FOLDERS[name]: _folder_split(path / name, classes) for name in names}


def _subfolders(path: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _folder_split(root: pathlib.Path, classes: list[str]) -> FolderSplit:
    if not classes:
        raise UserError(f"{root} has no sub-folders: one sub-folder of images per class is expected")
    if foreign := sorted(set(_subfolders(root)) - set(classes)):
        raise UserError(
            f"{root} has the class {foreign[0]!r}, which the train split lacks: the splits must share their classes"
        )
    files, digest = [], hashlib.sha256(json.dumps(classes).encode())
    for label, name in enumerate(classes):
        for relative, size in sorted(_files(root, name)):
            files.append((relative, label))
            digest.update(f"{relative}\0{size}\n".encode())
    if not files:
        raise UserError(f"{root} has class folders but no files in them")
    return FolderSplit(root, classes, files, digest.hexdigest())


def _files(root: pathlib.Path, relative: str) -> list[tuple[str, int]]:
    """All files below root/relative with their sizes; hidden ones are left out."""
    found = []
    if not (root / relative).is_dir():
        return found
    for entry in os.scandir(root / relative):
        name = f"{relative}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _files(root, name)
        else:
            found.append((name, entry.stat().st_size))
    return found


@dataclass(frozen=True)
class TfdsSplit:
    """A split of a TFDS dataset that was built as ArrayRecord; images come out as the bytes that were put in."""

    folder: str
    split: str
    image: str  # key of the image feature
    label: str  # key of the label feature
    classes: list[str]
    identity: str
    records: range

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Item:
        example = _tfds_reader(self.folder, self.split, self.image)[self.records[i]]
        return Item(f"{self.split}[{self.records[i]}]", example[self.image], int(example[self.label]))

    def part(self, start: int, stop: int) -> "TfdsSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, records=self.records[start:stop])


@functools.cache  # one per process
def _tfds_reader(folder: str, split: str, image: str):
    import tensorflow_datasets as tfds  # here and below: it takes seconds, and folders do without

    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})


def open_tfds(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, TfdsSplit]:
    """Any image-classification dataset of TFDS, built as ArrayRecord in the data_dir `root` unless it is there already.

    Raises:
        UserError: if there is no such dataset, it has no image with a class label, its files must be fetched by hand first,
            or TFDS builds it with TensorFlow.
    """
    import tensorflow_datasets as tfds

    del image_size, scratch
    if not argument:
        raise UserError("--source=tfds needs a name: --source=tfds:imagenet2012, --source=tfds:cifar10, ...")
    try:
        builder = tfds.builder(argument, data_dir=root or None, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"--source=tfds:{argument}: {str(error).strip().splitlines()[0]}") from None
    try:
        return _tfds_splits(builder)
    except ImportError:
        raise UserError(
            f"TFDS builds {argument} with packages that are not installed here (TensorFlow, as a rule): build it once where "
            f"they are, by tfds.builder({argument!r}, data_dir=DIR, file_format='array_record').download_and_prepare(), "
            "and give that DIR as --from; reading it needs nothing more"
        ) from None
    except AssertionError as error:  # TFDS's way to ask for files that must be fetched by hand
        raise UserError(f"--source=tfds:{argument}: {' '.join(str(error).split())}") from None


def _tfds_splits(builder) -> dict[str, TfdsSplit]:
    """Builds the dataset unless that was done before, and describes its splits."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if keys := builder.info.supervised_keys:
        images, labels = [k for k in images if k == keys[0]], [k for k in labels if k == keys[1]]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(f"{builder.name} has the features {', '.join(features)}: one image and one class label are needed")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself at length; its progress bars go to stderr
        builder.download_and_prepare(file_format="array_record")
    if (kind := builder.info.file_format.value) != "array_record":
        raise UserError(f"{builder.data_path} holds {kind} files, not array_record: give another data_dir as --from")
    return {
        name: TfdsSplit(
            folder=os.fspath(builder.data_path),
            split=name,
            image=images[0],
            label=labels[0],
            classes=list(features[labels[0]].names),
            identity=f"{builder.info.full_name} {name} {info.num_examples} {info.num_bytes}",
            records=range(info.num_examples),
        )
        for name, info in builder.info.splits.items()
        if info.num_examples
    }


def open_photo_crops(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, TfdsSplit]:
    """Random crops of ten photographs (`photo_crops.PhotoCrops`), built in the scratch folder."""
    import tensorflow_datasets as tfds

    from dip_jax.data import photo_crops

    del argument, root
    config = photo_crops.CropsConfig(image_size)
    tfds.disable_progress_bar()  # the generator has its own
    return _tfds_splits(photo_crops.PhotoCrops(config=config, data_dir=os.fspath(scratch), file_format="array_record"))


SOURCES = {
    "folder": Source(open_folder),
    "tfds": Source(open_tfds),
    "photo_crops": Source(open_photo_crops, encoding="raw", image_size=64),
}
