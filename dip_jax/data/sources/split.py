"""What every source gives: splits of encoded images by position, cheap to send to another process."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

# Names of splits in folders and files, and ours for them.
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
MOST_CLASSES = 1_000_000  # a label beyond is a mistake, not a class


@dataclass(frozen=True)
class Item:
    """One image of a split as the source holds it."""

    name: str  # what a user finds it by: a file's path, or a record's number
    data: bytes  # any encoding that Pillow reads
    label: int
    problem: str = ""  # why the source cannot give the image


@runtime_checkable
class Split(Protocol):
    """What `prepare` asks of a split.

    Attributes:
        classes: names, by label.
        notes: what the source held besides images, a line each, for people.
    """

    classes: list[str]
    notes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def part(self, start: int, stop: int) -> "Split":
        """The items in [start, stop)."""
        ...

    def listing(self) -> Iterator[tuple[str, str]]:
        """(name, mark) of everything that it reads; a mark changes with the content, as far as can be seen without reading."""
        ...


def listing_lines(split: Split) -> Iterator[str]:
    """The listing as lines of JSON, the classes first: what a restarted `prepare` compares."""
    yield json.dumps(split.classes)
    for name, mark in split.listing():
        yield json.dumps([name, mark])


def identity(split: Split) -> str:
    """A digest of the listing and the classes."""
    digest = hashlib.sha256()
    for line in listing_lines(split):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def split_of(path: str) -> str:
    """The split that a file's path names, as in train-00000-of-00294.parquet or validation/0000.parquet; else "train"."""
    for part in reversed(path.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in SPLITS:
                return SPLITS[word]
    return "train"


def count(n: int, thing: str) -> str:
    """ "1 image", "2 images"; a class is the one word here that takes -es."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}{'es' if thing.endswith('s') else 's'}"
