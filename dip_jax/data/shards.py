"""A dataset directory: ArrayRecord shards and `dataset.json`.

A record is the label (int32, little-endian) followed by the image in the dataset's encoding. `dataset.json` holds the classes,
the counts, the image size (null: originals, cropped when read), the encoding, each shard's records, bytes and SHA-256, and a
fingerprint over all that: two datasets with one fingerprint hold the same records in the same order.
"""

import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from array_record.python import array_record_module

from dip_jax.errors import UserError

DATASET_FILE = "dataset.json"
FORMAT = 1
_LABEL = struct.Struct("<i")


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of a dataset."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says."""

    source: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    image_size: int | None
    encoding: str
    shards: tuple[Shard, ...]
    exif: str = "ignore"  # row of images.EXIF: whether photographs were turned as their EXIF says

    @property
    def num_records(self) -> int:
        """Records in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides what record i is; not over where it came from."""
        content = {key: value for key, value in asdict(self).items() if key != "source"}
        if self.exif == "ignore":  # as in datasets from before there was a choice
            del content["exif"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `dataset.json`."""
        values = {"format": FORMAT, "fingerprint": self.fingerprint, "num_records": self.num_records} | asdict(self)
        return json.dumps(values, indent=1) + "\n"


@dataclass(frozen=True)
class FileInstruction:
    """A shard with its record count, so that opening a dataset opens no shard (ArrayRecord reads these four names)."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


def write_shard(path: pathlib.Path, records: Iterable[tuple[int, bytes]]) -> Shard:
    """Writes (label, image bytes) pairs as one shard, hashed and on disk when this returns."""
    # One record per group for random access; no compression, for the images are compressed or small.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
    count = 0
    try:
        for label, image in records:
            writer.write(_LABEL.pack(label) + image)
            count += 1
    finally:
        writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Shard(path.name, count, file.tell(), digest)


def parse_record(record: bytes) -> tuple[int, bytes]:
    """(label, image bytes) of one record; the inverse of what `write_shard` stores."""
    return _LABEL.unpack_from(record)[0], record[_LABEL.size :]


def find_dataset(path: str | os.PathLike, *, source: str = "folder") -> pathlib.Path:
    """The directory that holds `dataset.json`: `path`, or its train split.

    Raises:
        UserError: if there is none, with the command that makes one from `source`.
    """
    if "://" in os.fspath(path):
        raise UserError(f"{os.fspath(path)} is no directory: ArrayRecord reads files; mount the bucket (gcsfuse) or copy it")
    folder = pathlib.Path(path).expanduser().absolute() if os.fspath(path) else None
    for candidate in (folder, folder / "train") if folder else ():
        if (candidate / DATASET_FILE).is_file():
            return candidate
    raw = folder is not None and folder.is_dir() and any(folder.iterdir())  # images as they were found, most likely
    place, out = (folder, "DATASET_DIR") if raw else ("DIR", os.fspath(path) or "DATASET_DIR")
    origin = {"photo_crops": "--source=photo_crops"}.get(source, f"--source={source} --from={place} --image_size=N")
    raise UserError(
        f"no dataset at {os.fspath(path) or '(data.path is empty)'}: prepare one with "
        f"`python -m dip_jax prepare {origin} --out={out}`"
    )


def read_info(folder: pathlib.Path) -> DatasetInfo:
    """Reads `dataset.json` and checks that it fits itself and that every shard is there with its size.

    Raises:
        UserError: if it does not.
    """
    try:
        values = json.loads((folder / DATASET_FILE).read_text())
        shards = tuple(Shard(**shard) for shard in values["shards"])
        info = DatasetInfo(
            source=values["source"],
            classes=tuple(values["classes"]),
            class_counts=tuple(values["class_counts"]),
            image_size=values["image_size"],
            encoding=values["encoding"],
            shards=shards,
            exif=values.get("exif", "ignore"),
        )
        intact = values["format"] == FORMAT and values["fingerprint"] == info.fingerprint
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / DATASET_FILE} is damaged ({type(error).__name__}: {error}): prepare the dataset again"
        ) from None
    if not intact:
        raise UserError(f"{folder / DATASET_FILE} was changed or is of another format: prepare the dataset again")
    if not info.num_records:
        raise UserError(f"{folder} holds no records: prepare the dataset again")
    for shard in info.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "missing" if size is None else f"{size} bytes long"
            raise UserError(f"{path} is {found} where {shard.bytes} bytes were expected: prepare the dataset again")
    return info
