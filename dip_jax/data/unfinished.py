"""Unfinished work of `prepare`: its lock, and what was asked and of what source; other shards are never mixed in."""

import contextlib
import fcntl
import gzip
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dip_jax.data import sources
from dip_jax.data.sources.split import count, listing_lines
from dip_jax.errors import UserError

_REQUEST_FILE = "request.json"
_LISTING = "listing-{}.gz"  # what a split of the source held: its classes, then (name, mark) a line
_SHOWN = 3  # names


@contextlib.contextmanager
def locked(partial: pathlib.Path) -> Iterator[None]:
    """Holds the unfinished work against a second `prepare`."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")  # noqa: SIM115 (used below, outside this try)
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}; choose another --out") from None
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, partial)
        stack.enter_context(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{partial} is being written by another prepare: wait for it, or choose another --out") from None
        try:
            yield
        finally:
            if {entry.name for entry in partial.glob("*")} == {"lock"}:  # a mistake, found before any work
                shutil.rmtree(partial, ignore_errors=True)


def _remove_if_empty(folder: pathlib.Path) -> None:
    """Over NFS a folder is not empty before the lock in it is closed."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all, also after a kill."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """What was asked of the unfinished work in `folder`; None where there is none.

    Raises:
        UserError: if the file that says it is damaged.
    """
    file = folder / _REQUEST_FILE
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}): remove {folder} to start afresh") from None


def note(folder: pathlib.Path, *, asked: Mapping[str, Any], splits: Mapping[str, sources.Split]) -> None:
    """Notes what is asked of new work in `folder`, or refuses to mix finished shards of another request with it.

    Args:
        folder: the unfinished work.
        asked: JSON values; "content" holds the identity of each split.
        splits: the source as it is now.

    Raises:
        UserError: with the key and both values; of a changed source, with what changed.
    """
    before = read(folder)
    if before is None:
        for name, split in splits.items():
            with gzip.open(folder / _LISTING.format(name), "wt", compresslevel=1, encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in listing_lines(split))
        write_atomically(folder / _REQUEST_FILE, json.dumps(asked, indent=1))
        return
    for key, value in asked.items():
        if before.get(key) == value:
            continue
        found = f"with {key}={before.get(key)} where now {key}={value}"
        if key == "content":
            found = f"of a source that has changed since: {_change(folder, splits)}"
        raise UserError(f"{folder} is unfinished work {found}: remove it to start afresh, or repeat the command that began it")


def _change(folder: pathlib.Path, splits: Mapping[str, sources.Split]) -> str:
    """What differs between the source as it was noted and as it is."""
    differences = []
    for name, split in splits.items():
        try:
            with gzip.open(folder / _LISTING.format(name), "rt", encoding="utf-8") as file:
                old_classes, *old = map(json.loads, file)
        except (OSError, EOFError, ValueError):
            differences.append(f"the split {name} is new")
            continue
        _, *new = map(json.loads, listing_lines(split))
        before, now = dict(old), dict(new)
        prefix = f"{name}: " if len(splits) > 1 else ""
        found = [
            _some("class added", "classes added", set(split.classes) - set(old_classes)),
            _some("class removed", "classes removed", set(old_classes) - set(split.classes)),
            _some("added", "added", now.keys() - before.keys()),
            _some("removed", "removed", before.keys() - now.keys()),
            _some(
                "of other content", "of other content", {key for key in now.keys() & before.keys() if now[key] != before[key]}
            ),
        ]
        if any(found):
            differences.append(prefix + ", ".join(filter(None, found)))
    gone = {path.name for path in folder.glob(_LISTING.format("*"))} - {_LISTING.format(name) for name in splits}
    differences += [f"{count(len(gone), 'split')} removed"] if gone else []
    return "; ".join(differences) or "the same things in another order"


def _some(one: str, several: str, names: Iterable[str]) -> str:
    chosen = sorted(names)
    if not chosen:
        return ""
    more = ", ..." if len(chosen) > _SHOWN else ""
    return f"{len(chosen)} {one if len(chosen) == 1 else several} ({', '.join(chosen[:_SHOWN])}{more})"
