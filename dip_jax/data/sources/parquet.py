"""Image-classification sets as Hugging Face stores them: parquet files with an image's bytes and its label in each row."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dip_jax.data.sources.split import MOST_CLASSES, Item, count, split_of
from dip_jax.errors import UserError

_ROWS = 32  # decoded at a time: what bounds the memory, whatever the row groups are
_BUFFER = 1 << 20  # bytes read of a column at a time


@dataclass(frozen=True)
class _Columns:
    """Where a row keeps what."""

    image: str  # a struct with "bytes", or the bytes themselves
    nested: bool
    label: str

    @property
    def read(self) -> list[str]:
        return [f"{self.image}.bytes" if self.nested else self.image, self.label]


@dataclass(frozen=True)
class ParquetSplit:
    """Rows of parquet files, in their order."""

    folder: pathlib.Path
    files: list[str]  # below the folder
    ends: list[int]  # rows up to the end of each file
    marks: list[str]  # what changes with each file
    columns: _Columns
    classes: list[str]
    named: bool  # labels are class names
    records: range
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Item:
        record = self.records[i]
        number = bisect.bisect_right(self.ends, record)
        row = record - (self.ends[number - 1] if number else 0)
        name = f"{self.files[number]}[{row}]"
        reader = _reader(self.folder / self.files[number], self.marks[number], self.columns)
        data, label = reader.row(row)
        if self.named:
            label = _label_of(tuple(self.classes)).get(label)
        if data is None or label is None:
            return Item(name, b"", -1, f"no {'label' if data is not None else 'bytes'} in the row")
        return Item(name, data, label)

    def part(self, start: int, stop: int) -> "ParquetSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, records=self.records[start:stop])

    def listing(self) -> Iterator[tuple[str, str]]:
        """The files with their sizes and a digest of what their footers say."""
        return zip(self.files, self.marks, strict=True)


@functools.lru_cache(maxsize=1)
def _label_of(classes: tuple[str, ...]) -> Mapping[str, int]:
    return {name: label for label, name in enumerate(classes)}


@functools.lru_cache(maxsize=1)  # one open file per process
def _reader(path: pathlib.Path, mark: str, columns: _Columns) -> "_Reader":
    del mark  # another content is another file
    return _Reader(path, columns)


class _Reader:
    """Rows of a file one after the other; another place costs the decoding of its row group up to there."""

    def __init__(self, path: pathlib.Path, columns: _Columns):
        self._path, self._columns, self._file = path, columns, _open(path)
        self._rows, self._next = iter(()), -1

    def row(self, row: int) -> tuple[bytes | None, Any]:
        """(image bytes, label) of a row.

        Raises:
            UserError: if the file is damaged there.
        """
        import pyarrow

        try:
            if row != self._next:
                self._start(row)
            for value in itertools.islice(self._rows, row - self._next, None):
                self._next = row + 1
                return value
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self._path}, row {row}: damaged ({_line(error)}): fetch the file again") from None
        raise UserError(f"{self._path} ends before row {row}: it changed meanwhile")

    def _start(self, row: int) -> None:
        metadata = self._file.metadata
        ends = list(itertools.accumulate(metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)))
        group = bisect.bisect_right(ends, row)
        self._next = ends[group - 1] if group else 0
        batches = self._file.iter_batches(
            batch_size=_ROWS, row_groups=range(group, len(ends)), columns=self._columns.read, use_threads=False
        )
        self._rows = (pair for batch in batches for pair in self._pairs(batch))

    def _pairs(self, batch) -> Iterator[tuple[bytes | None, Any]]:
        images = batch.column(self._columns.image)
        if self._columns.nested:
            images = images.flatten()[0]
        return zip(images.to_pylist(), batch.column(self._columns.label).to_pylist(), strict=True)


def _open(path: pathlib.Path):
    """A parquet file, read in small pieces."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({_line(error)}): fetch it again") from None


def open_parquet(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, ParquetSplit]:
    """A folder of parquet files (or one file) with a column of images and one of labels; splits by the files' names.

    Class names are those of the label's ClassLabel where the schema has Hugging Face's description; else strings are names
    (sorted) and whole numbers labels.

    Args:
        argument: the label's column, needed where there are several.
        root: the folder or file.

    Raises:
        UserError: if pyarrow is missing, there are no such files, or they have no such columns.
    """
    del image_size, scratch
    try:
        import pyarrow  # noqa: F401 (the complaint comes before the work)
    except ImportError:
        raise UserError('--source=parquet needs pyarrow: pip install "dip_jax[parquet]", or pip install pyarrow') from None
    if not root:
        raise UserError("--source=parquet needs --from=DIR, a folder of .parquet files, or one file")
    base = pathlib.Path(root).expanduser().absolute()
    paths = [base] if base.is_file() else sorted(base.rglob("*.parquet"))
    if not paths:
        raise UserError(f"--from={root} has no .parquet files: give the folder that holds them")
    folder = base.parent if base.is_file() else base
    grouped: dict[str, list[_Facts]] = {}
    columns, described = _columns(_open(paths[0]).schema_arrow, argument, where=paths[0])
    for path in paths:
        grouped.setdefault(split_of(path.relative_to(folder).as_posix()), []).append(_facts(path, folder, columns))
    unlabelled = {name: facts for name, facts in grouped.items() if all(f.highest is not None and f.highest < 0 for f in facts)}
    labelled = {name: [f for f in facts if f.rows] for name, facts in grouped.items() if name not in unlabelled}
    labelled = {name: facts for name, facts in labelled.items() if facts}
    if not labelled:
        raise UserError(f"--from={root} has no rows with a label in {columns.label!r}")
    notes = [
        f"left out: the split {name}, {count(sum(f.rows for f in facts), 'image')} without labels"
        for name, facts in unlabelled.items()
    ]
    classes, named = described, False
    if classes is None:
        classes, named = _class_names([f for facts in labelled.values() for f in facts], folder, columns)
    splits = {}
    for name, facts in labelled.items():
        ends = list(itertools.accumulate(f.rows for f in facts))
        files, marks = [f.file for f in facts], [f.mark for f in facts]
        splits[name] = ParquetSplit(folder, files, ends, marks, columns, classes, named, range(ends[-1]), notes)
        notes = []  # said once
    return splits


def _columns(schema, label: str, *, where: pathlib.Path) -> tuple[_Columns, list[str] | None]:
    """The columns of image and label, and the class names where the schema's description has them."""
    import pyarrow

    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    binary = {f.name for f in schema if pyarrow.types.is_binary(f.type) or pyarrow.types.is_large_binary(f.type)}
    nested = {f.name for f in schema if pyarrow.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0}
    images = [name for name in schema.names if name in binary | nested]
    kinds = {name: feature.get("_type") for name, feature in described.items() if isinstance(feature, dict)}
    labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    if label:
        labels = [label] if label in schema.names else []
    elif "label" in schema.names and len(labels) != 1:
        labels = ["label"]
    images = ["image"] if "image" in images else images
    found = f"{where.name} has the columns {', '.join(schema.names)}"
    if len(images) != 1:
        raise UserError(f"{found}: one column of images is needed, with their bytes, such as image")
    if len(labels) != 1:
        raise UserError(f"{found}: say which is the label by --source=parquet:COLUMN")
    kind = schema.field(labels[0]).type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{where.name}: the label {labels[0]!r} is {kind}: whole numbers or names are expected")
    names = described.get(labels[0], {}).get("names") if kinds.get(labels[0]) == "ClassLabel" else None
    return _Columns(images[0], images[0] in nested, labels[0]), names


@dataclass(frozen=True)
class _Facts:
    """What a file's footer says."""

    file: str
    rows: int
    mark: str
    highest: Any  # of its labels; None where the footer does not say


def _facts(path: pathlib.Path, folder: pathlib.Path, columns: _Columns) -> _Facts:
    with _open(path) as file:
        missing = [name for name in (columns.image, columns.label) if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}, which the first file has: give one set's files")
        metadata = file.metadata
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        place = next((k for k in range(metadata.num_columns) if metadata.schema.column(k).path == columns.label), None)
        tops = [group.column(place).statistics for group in groups] if place is not None else [None]
        known = [top.max for top in tops if top is not None and top.has_min_max]
        highest = max(known) if known and len(known) == len(groups) and not isinstance(known[0], str | bytes) else None
    size = path.stat().st_size
    with open(path, "rb") as raw:
        raw.seek(max(size - 8, 0))
        length = int.from_bytes(raw.read(4), "little")
        raw.seek(max(size - 8 - length, 0))
        digest = hashlib.sha256(raw.read()).hexdigest()[:16]
    return _Facts(path.relative_to(folder).as_posix(), metadata.num_rows, f"{size} {digest}", highest)


def _class_names(facts: Sequence[_Facts], folder: pathlib.Path, columns: _Columns) -> tuple[list[str], bool]:
    """(class names, whether the labels are such names) from the labels themselves."""
    values = set()
    for fact in facts:
        with _open(folder / fact.file) as file:
            for batch in file.iter_batches(columns=[columns.label], use_threads=False):
                values |= set(batch.column(0).unique().to_pylist())
    values.discard(None)
    if not values:
        raise UserError(f"{folder} has no rows with a label in {columns.label!r}")
    if isinstance(next(iter(values)), str):
        return sorted(values), True
    if max(values) >= MOST_CLASSES:
        raise UserError(f"{folder} has the label {max(values)}: labels count from 0 to the number of classes less one")
    return [str(label) for label in range(max(values) + 1)], False


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
