"""A prepared dataset, read record by record."""

import os
import pathlib
from typing import Any

import grain

from dip_jax.data import images, shards
from dip_jax.errors import UserError

_NAMED = 5  # classes that a dataset prints
_NEIGHBOURS = 100  # tried in place of a bad record before giving up


class BadRecordError(UserError):
    """A record that is no usable image or has no valid label; the message names shard and record."""


class Dataset:
    """A prepared dataset, random access: `dataset[i]` -> {"image": uint8 [H, W, 3], "label": int}.

    Args:
        folder: the directory that holds dataset.json.
        image_size: crop size where the dataset stores originals; else None or the stored size.

    Attributes:
        classes: class names, by label.
        fingerprint: SHA-256 that identifies records and order.
        image_size: H = W of every image.
    """

    def __init__(self, folder: pathlib.Path, *, image_size: int | None = None):
        info = shards.read_info(folder)
        if info.image_size is None and image_size is None:
            raise UserError(f"{folder} stores original images: say at which image_size to crop them")
        if info.image_size is not None and image_size not in (None, info.image_size):
            raise UserError(
                f"{folder} holds {info.image_size}x{info.image_size} images where {image_size}x{image_size} are wanted: "
                f"prepare another with --image_size={image_size}, or store originals with --encoding=original"
            )
        images.require_codec(info.encoding)
        self.folder, self.info = folder, info
        self.classes, self.fingerprint = list(info.classes), info.fingerprint
        self.image_size = info.image_size or image_size
        files = [shards.FileInstruction(os.fspath(folder / s.file), s.records, s.records) for s in info.shards]
        self._records = grain.sources.ArrayRecordDataSource(files)

    def __repr__(self) -> str:
        names = ", ".join(self.classes[:_NAMED]) + (", ..." if self.num_classes > _NAMED else "")
        side = f"{self.image_size}x{self.image_size}"
        kinds = "class" if self.num_classes == 1 else "classes"
        return f"Dataset({self.folder}: {len(self)} images of {side} pixels, {self.num_classes} {kinds}: {names})"

    @property
    def num_classes(self) -> int:
        """Number of classes; labels lie in [0, num_classes)."""
        return len(self.classes)

    def __len__(self) -> int:
        return self.info.num_records

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Record i.

        Raises:
            IndexError: if i is not in [0, len).
            BadRecordError: if the record is damaged.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of a dataset of {len(self)}")
        try:
            label, data = shards.parse_record(self._records[i])
            if not 0 <= label < self.num_classes:
                raise images.BadImageError(f"label {label} is outside [0, {self.num_classes})")
            image = images.pixels(data, self.info.encoding, image_size=self.image_size, stored_size=self.info.image_size)
        except Exception as error:  # ArrayRecord reports a damaged file by several types
            raise BadRecordError(
                f"{self._place(i)}: {error}; restore that shard, or set data.on_bad_record=replace to go on without the record"
            ) from None
        return {"image": image, "label": label}

    def label(self, i: int) -> int:
        """The label of record i, without decoding its image."""
        return shards.parse_record(self._records[i])[0]

    def _place(self, i: int) -> str:
        for shard in self.info.shards:
            if i < shard.records:
                return f"bad record: shard {self.folder / shard.file} record {i}"
            i -= shard.records
        raise AssertionError

    def replaced(self, i: int) -> tuple[dict[str, Any], int]:
        """Record i, or the first good one after it; and how many bad ones were passed over."""
        for skipped in range(_NEIGHBOURS):
            try:
                return self[(i + skipped) % len(self)], skipped
            except BadRecordError as error:
                last = error
        raise last


def open_dataset(path: str | os.PathLike, *, image_size: int | None = None, source: str = "folder") -> Dataset:
    """Opens a directory that `python -m dip_jax prepare` made; its train split where it has several.

    Args:
        path: the directory, or a split's directory inside it.
        image_size: crop size, needed only where the dataset stores originals.
        source: what the dataset would be prepared from, for the message if there is none.

    Raises:
        UserError: if there is no dataset, a shard is missing or of another length, or the image size is another.
    """
    return Dataset(shards.find_dataset(path, source=source), image_size=image_size)
