"""Tar archives, read where they are: WebDataset's shards, and ImageNet's own tar of a thousand tars."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dip_jax.data.sources.split import MOST_CLASSES, Item, count, split_of
from dip_jax.data.sources.tree import is_hidden, is_image_name
from dip_jax.data.sources.zips import MOST_BYTES
from dip_jax.errors import UserError

_ENTRY = np.dtype([("file", "i4"), ("offset", "i8"), ("size", "i8"), ("label", "i4")])
_END = 1 << 20  # bytes after the last member that are looked at; tar pads by 10 KiB, some by more
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7z": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_MOST_TEXT = 1 << 16  # bytes of a label's file


@dataclass(frozen=True)
class TarSplit:
    """Members of tars. The numbers are an array: a million members are tens of megabytes."""

    files: list[str]
    classes: list[str]
    names: list[str]
    entries: np.ndarray  # _ENTRY
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Item:
        number, offset, size, label = self.entries[i].tolist()
        if size < 0:
            return Item(self.names[i], b"", label, "not a plain file with its bytes in the tar")
        if size > MOST_BYTES:
            return Item(self.names[i], b"", label, f"{size} bytes are too many for an image")
        if label < 0:
            return Item(self.names[i], b"", label, "no label beside it (.cls, or .json with a label)")
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            return Item(self.names[i], file.read(size), label)

    def part(self, start: int, stop: int) -> "TarSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, names=self.names[start:stop], entries=self.entries[start:stop])

    def listing(self) -> Iterator[tuple[str, str]]:
        """Names with places and sizes."""
        for name, entry in zip(self.names, self.entries.tolist(), strict=True):
            yield name, " ".join(map(str, entry[1:]))


@dataclass(frozen=True)
class _Member:
    """A file in a tar; size -1 where it is a link, a sparse file or the like."""

    name: str
    offset: int
    size: int


def _members(file, path: pathlib.Path, *, start: int, stop: int) -> Iterator[_Member]:
    """The members of the tar at [start, stop) of an open file, without its folders and hidden files.

    Raises:
        UserError: if it is damaged, cut off or compressed.
    """
    file.seek(start)
    head = file.read(8)
    for magic, command in _PACKED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is compressed, so that no image in it can be found: {command} it first")
    file.seek(start)
    last = start
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep all of them
            last, end = tar.offset, member.offset_data + max(member.size, 0)
            if member.size < 0 or end > stop:
                raise tarfile.ReadError(f"{member.name} ends beyond the end")
            if not member.isdir() and not is_hidden(member.name.rpartition("/")[2]):
                plain = member.isreg() and not member.issparse()
                yield _Member(member.name, member.offset_data, member.size if plain else -1)
        file.seek(last)
        rest = file.read(min(_END, stop - last))
        if not rest or rest.strip(b"\0"):
            raise tarfile.ReadError("no end mark where the last member ends")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no tar or a damaged one ({error}; byte {last}): fetch it again") from None


def open_imagenet_tar(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, TarSplit]:
    """ILSVRC2012_img_train.tar as it is: a tar of one tar per synset. Labels 0-999 by sorted synset, images by name.

    Raises:
        UserError: if there is no such tar, it holds no tars, or it is damaged.
    """
    del argument, image_size, scratch
    path = _file("imagenet_tar", root, "ILSVRC2012_img_train.tar")
    found = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        inner = [member for member in _members(file, path, start=0, stop=size) if member.name.endswith(".tar")]
        if not inner:
            raise UserError(f"{path} holds no tars: ImageNet's training tar has one per class; for others --source=webdataset")
        inner.sort(key=lambda member: member.name)
        for label, tar in enumerate(inner):
            if tar.size < 0:
                raise UserError(f"{path}: {tar.name} is a link: pack the tar with the files themselves")
            synset = pathlib.PurePosixPath(tar.name).stem
            inside = _members(file, path, start=tar.offset, stop=tar.offset + tar.size)
            own = [(f"{synset}/{member.name}", 0, member.offset, member.size, label) for member in inside]
            found += sorted(own)
    if not found:
        raise UserError(f"{path} holds tars, but no images in them")
    classes = [pathlib.PurePosixPath(tar.name).stem for tar in inner]
    notes = (
        [] if len(classes) == 1000 else [f"{count(len(classes), 'synset')} where ImageNet has 1000: other labels than its own"]
    )
    return {"train": _tar_split([path], classes, found, notes)}


def _tar_split(paths: Sequence[pathlib.Path], classes: list[str], found: list[tuple], notes: list[str]) -> TarSplit:
    """A split of (name, number of the file, offset, size, label)."""
    entries = np.array([one[1:] for one in found], _ENTRY)
    return TarSplit([os.fspath(path) for path in paths], classes, [one[0] for one in found], entries, notes)


def _file(source: str, root: str, example: str) -> pathlib.Path:
    if not root:
        raise UserError(f"--source={source} needs --from=FILE, such as {example}")
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"--from={root} is no file: give {example}")
    return path


@dataclass
class _Sample:
    """Members of one key, as they come."""

    image: _Member | None = None
    label: int | str | None = None


def open_webdataset(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, TarSplit]:
    """Tars in which files of one name belong together: an image, and its label as .cls (a number or a name) or in a .json.

    Splits by the tars' names (train-0000.tar, validation/0000.tar). Whole numbers are labels, whose names are the lines of
    classnames.txt beside the tars where there is one; anything else is a class's name.

    Raises:
        UserError: if there are no tars, one is damaged, or none of their members is an image with a label.
    """
    del argument, image_size, scratch
    if not root:
        raise UserError("--source=webdataset needs --from=DIR, a folder of tars, or one tar")
    folder = pathlib.Path(root).expanduser().absolute()
    tars = [folder] if folder.is_file() else sorted(folder.rglob("*.tar"))
    if not tars:
        packed = next(folder.rglob("*.tar.*"), None) if folder.is_dir() else None
        raise UserError(f"--from={root} has no .tar" + (f" but {packed.name}: decompress them first" if packed else ""))
    base = folder.parent if folder.is_file() else folder
    grouped: dict[str, list[pathlib.Path]] = {}
    for tar in tars:
        grouped.setdefault(split_of(tar.relative_to(base).as_posix()), []).append(tar)
    read = {name: _read_samples(paths, base) for name, paths in grouped.items()}
    labels = [label for found, _ in read.values() for *_, label in found if label is not None]
    if not labels:
        raise UserError(f"--from={root} has no image with a label: a .jpg and a .cls (or a .json with a label) of one name")
    classes, label_of = _class_names(labels, base)
    splits = {}
    for name, (found, notes) in read.items():
        named = [(*rest, label_of.get(label, -1)) for *rest, label in found]
        splits[name] = _tar_split(grouped[name], classes, named, notes)
    return splits


def _read_samples(paths: Sequence[pathlib.Path], base: pathlib.Path) -> tuple[list[tuple], list[str]]:
    """[(name, number of the tar, offset, size, label as it stands or None)] of the samples in tars, and notes."""
    found, without = [], []
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            samples: dict[str, _Sample] = {}
            for member in _members(file, path, start=0, stop=os.fstat(file.fileno()).st_size):
                _add(samples, member, file)
            name = path.relative_to(base).as_posix()
            for key, sample in samples.items():
                if sample.image is None:
                    without.append(f"{name}/{key}")
                    continue
                image = sample.image
                found.append((f"{name}/{image.name}", number, image.offset, image.size, sample.label))
    notes = [f"left out: {count(len(without), 'sample')} without an image ({without[0]})"] if without else []
    return found, notes


def _add(samples: dict[str, _Sample], member: _Member, file) -> None:
    """Puts a member with the others of its key: its name up to the first dot after the folders."""
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
    suffix = suffix.lower()
    if "." not in suffix and is_image_name(f"x.{suffix}"):
        sample.image = sample.image or member
    elif suffix in ("cls", "json") and 0 <= member.size <= _MOST_TEXT:
        file.seek(member.offset)
        text = file.read(member.size).decode("utf-8", "replace").strip()
        label = _label(text, suffix)
        if label is not None and (suffix == "cls" or sample.label is None):
            sample.label = label


def _label(text: str, suffix: str) -> int | str | None:
    value = text
    if suffix == "json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        value = (
            next((values[key] for key in ("label", "cls", "class") if key in values), None)
            if isinstance(values, dict)
            else values
        )
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    with contextlib.suppress(ValueError):
        return int(value)
    return value or None


def _class_names(labels: Sequence[int | str], base: pathlib.Path) -> tuple[list[str], dict[int | str, int]]:
    """Class names, and the label of each value."""
    values = set(labels)
    if any(isinstance(value, str) for value in values):
        classes = sorted(map(str, values))
        label_of = {name: label for label, name in enumerate(classes)}
        return classes, {value: label_of[str(value)] for value in values}
    if max(values) >= MOST_CLASSES:
        raise UserError(f"{base} has the label {max(values)}: labels count from 0 to the number of classes less one")
    classes = [str(label) for label in range(max(values) + 1)]
    with contextlib.suppress(FileNotFoundError):
        names = (base / "classnames.txt").read_text(encoding="utf-8").splitlines()
        if len(names) < len(classes):
            raise UserError(
                f"{base / 'classnames.txt'} has {len(names)} lines for labels up to {max(values)}: a line per class"
            )
        classes = names
    return classes, {value: value for value in values if value >= 0}
