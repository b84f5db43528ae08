"""Images as files: a folder with a sub-folder per class, or a table of names and labels."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dip_jax.data.sources.split import MOST_CLASSES, Item
from dip_jax.data.sources.tree import Tree, is_hidden, is_image_name, sort_out
from dip_jax.errors import UserError

_FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
_LABEL_COLUMNS = ("label", "name", "class", "class_name")


@dataclass(frozen=True)
class FileSplit:
    """Files below a folder."""

    root: pathlib.Path
    classes: list[str]
    files: list[tuple[str, int, int]]  # path below root, label, bytes (-1: there is no such file)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        name, label, size = self.files[i]
        if size < 0:
            return Item(name, b"", label, "no such file")
        return Item(name, (self.root / name).read_bytes(), label)

    def part(self, start: int, stop: int) -> "FileSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, files=self.files[start:stop])

    def listing(self) -> Iterator[tuple[str, str]]:
        """Names with labels and sizes."""
        return ((name, f"{label} {size}") for name, label, size in self.files)


def open_folder(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, FileSplit]:
    """The folder as `tree.sort_out` has it.

    Raises:
        UserError: if there is no such folder, no class in it, or a split with other classes than train.
    """
    del argument, image_size, scratch
    if not root:
        raise UserError("--source=folder needs --from=DIR, a folder with one sub-folder of images per class")
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"--from={root} is not a folder: give a folder with one sub-folder of images per class")
    splits = sort_out(walk(path), name=os.fspath(path))
    return {name: FileSplit(path, split.classes, split.files, split.notes) for name, split in splits.items()}


def walk(root: pathlib.Path) -> Tree:
    """Everything below a folder; an image comes with its bytes. Links are followed, but not in a circle."""
    tree, todo = Tree(), [("", frozenset())]
    while todo:  # no recursion: people nest deeper than Python does
        folder, above = todo.pop()
        state = os.stat(root / folder)
        if (state.st_dev, state.st_ino) in above:
            tree.links.append(folder)
            continue
        above |= {(state.st_dev, state.st_ino)}
        if folder:
            tree.folders.add(folder)
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = f"{folder}/{entry.name}" if folder else entry.name
                _sort_in(tree, todo, entry, path, above)
    for found in (tree.others, tree.links):
        found.sort()
    return tree


def _sort_in(tree: Tree, todo: list, entry: os.DirEntry, path: str, above: frozenset) -> None:
    if is_hidden(entry.name):
        tree.hidden.add(path)
        return
    try:
        state = entry.stat()
    except OSError:
        if not entry.is_symlink():
            raise
        tree.links.append(path)
        return
    if entry.is_dir():
        todo.append((path, above))
    elif entry.is_file() and is_image_name(entry.name):
        tree.images.append((path, state.st_size))
    else:
        tree.others.append(path)


def open_csv(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, FileSplit]:
    """The files that a table names, in its order: a column of paths relative to the table, and one of labels or class names.

    Whole numbers are labels (with a second column of names, those are the classes); anything else is a class's name, and the
    names sorted are the classes.

    Raises:
        UserError: if there is no such table, it has no such columns, no rows, or a row without a label.
    """
    del argument, image_size, scratch
    path = _table(root)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    columns = [name.strip().lower() for name in rows[0]] if rows else []
    files = [i for i, name in enumerate(columns) if name in _FILE_COLUMNS]
    labels = [i for i, name in enumerate(columns) if name in _LABEL_COLUMNS]
    if not files or not labels:
        raise UserError(
            f"{path} begins with the columns {', '.join(columns) or '(none)'}: its first line must name one of "
            f"{', '.join(_FILE_COLUMNS)} and one of {', '.join(_LABEL_COLUMNS)}, such as file,label"
        )
    if len(rows) == 1:
        raise UserError(f"{path} has no rows under its first line")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(columns) or not row[files[0]].strip() or not row[labels[0]].strip():
            raise UserError(f"{path}, row {number}: {delimiter.join(row)!r} has not a value for each of {', '.join(columns)}")
    classes, numbers = _labels([[row[i].strip() for i in labels] for row in rows[1:]], where=os.fspath(path))
    names = [row[files[0]].strip() for row in rows[1:]]
    found = [(name, number, _size(path.parent / name)) for name, number in zip(names, numbers, strict=True)]
    return {"train": FileSplit(path.parent, classes, found)}


def _table(root: str) -> pathlib.Path:
    """The CSV that --from names, or the one in the folder that it names."""
    if not root:
        raise UserError("--source=csv needs --from=FILE.csv, a table file,label with paths relative to it")
    path = pathlib.Path(root).expanduser().absolute()
    if path.is_file():
        return path
    tables = sorted(path.glob("*.csv"))
    if len(tables) != 1:
        found = "is no file" if not path.is_dir() else f"holds {', '.join(table.name for table in tables) or 'no .csv'}"
        raise UserError(f"--from={root} {found}: give the table itself, --from=FILE.csv")
    return tables[0]


def _labels(cells: Sequence[Sequence[str]], *, where: str) -> tuple[list[str], list[int]]:
    """Class names and the label of each row, from one column of labels or names, or from both."""
    numeric = [column for column in range(len(cells[0])) if all(row[column].lstrip("-").isdecimal() for row in cells)]
    if not numeric:
        classes = sorted({row[0] for row in cells})
        label_of = {name: label for label, name in enumerate(classes)}
        return classes, [label_of[row[0]] for row in cells]
    numbers = [int(row[numeric[0]]) for row in cells]
    if max(numbers) >= MOST_CLASSES:
        raise UserError(f"{where} has the label {max(numbers)}: labels count from 0 to the number of classes less one")
    classes = [str(label) for label in range(max(numbers) + 1)]
    named = [column for column in range(len(cells[0])) if column not in numeric]
    for row, label in zip(cells, numbers, strict=True):
        if named and label >= 0:
            classes[label] = row[named[0]]
    return classes, numbers


def _size(path: pathlib.Path) -> int:
    """Bytes of a regular file; -1 where there is none."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1
