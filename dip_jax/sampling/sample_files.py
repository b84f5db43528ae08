"""Where samples go on disk, so that a killed run goes on and ends with the same bytes as one that was not.

    FILE.npz                 the ADM evaluator's format: arr_0 uint8 [N,H,W,3], arr_1 int64 [N]; not compressed; and `settings`,
                             which that evaluator passes over: the JSON of what the images were made with, as text
    FILE.npz.json            the same; another run into the same output must agree
    FILE.npz.parts/000012    raw pixels of batch 12, while unfinished

    DIR/settings.json        the same, for a directory of pictures
    DIR/000123_0007.png      sample 123, class 7

A part or a picture gets its name when it is complete and on the disk, so a name means a finished one.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8
from PIL import Image

from dip_jax.errors import UserError
from dip_jax.runtime import storage

_CHUNK = 1 << 20  # bytes copied at once when the parts are joined
_INSIDE = "settings"  # name of the array that holds them


class Output(Protocol):
    """What a sampling run writes to, batch by batch, in any order and from any number of hosts."""

    def open(self, settings: Mapping[str, Any]) -> None:
        """Creates the output, or checks that it was begun with these settings (one host does it, before the others read).

        Raises:
            UserError: if it was begun with others, holds something else, or cannot be written.
        """

    def finished(self, batch: int) -> bool:
        """Whether this batch lies there whole."""

    def write(self, batch: int, images: UInt8[np.ndarray, "B H W C"]) -> None:
        """Stores one batch, whole or not at all."""

    def close(self) -> None:
        """Makes the final file once all batches are finished; does nothing the second time."""


class NpzFile:
    """An `Output` that becomes one .npz.

    Args:
        path: FILE.npz; ~ and buckets allowed.
        labels: class of every sample, [N].
        image_shape: (H, W, C).
        batch_size: samples per batch.
    """

    def __init__(self, path: epath.PathLike, *, labels: Int[np.ndarray, "N"], image_shape: tuple[int, ...], batch_size: int):
        self.path = storage.absolute(path)
        self._parts = self.path.parent / f"{self.path.name}.parts"
        self._settings = self.path.parent / f"{self.path.name}.json"
        self._labels = labels
        self._image_shape = image_shape
        self._batch_size = batch_size

    def open(self, settings: Mapping[str, Any]) -> None:
        """See `Output`."""
        begun = self.path.exists() or self._parts.exists()
        claim(self._settings, settings, begun=begun, out=self.path)
        if not self.path.exists():
            require_folder(self._parts)
            done = sum(self._size(batch) for batch in range(self._batches) if self.finished(batch))
            total = len(self._labels) * int(np.prod(self._image_shape))
            storage.require_space(self._parts, 2 * total - done)

    @property
    def _batches(self) -> int:
        return -(-len(self._labels) // self._batch_size)

    def _size(self, batch: int) -> int:
        rows = min(self._batch_size, len(self._labels) - batch * self._batch_size)
        return rows * int(np.prod(self._image_shape))

    def _part(self, batch: int) -> epath.Path:
        return self._parts / f"{batch:06d}"

    def finished(self, batch: int) -> bool:
        """See `Output`; a part of another length than the batch does not count."""
        part = self._part(batch)
        return self.path.exists() or (part.exists() and part.stat().length == self._size(batch))

    def write(self, batch: int, images: UInt8[np.ndarray, "B H W C"]) -> None:
        """See `Output`."""
        _write_whole(self._part(batch), np.ascontiguousarray(images).tobytes())

    def close(self) -> None:
        """See `Output`."""
        if not self.path.exists():
            partial = self.path.parent / f"{self.path.name}.partial" if storage.is_local(self.path) else self.path
            with partial.open("wb") as file:
                self._join(file)
                _sync(file, partial)
            if partial != self.path:
                partial.replace(self.path)
        if self._parts.exists():
            self._parts.rmtree()

    def _join(self, file: Any) -> None:
        shape = (len(self._labels), *self._image_shape)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with _member(archive, "arr_0.npy") as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for batch in range(self._batches):
                    with self._part(batch).open("rb") as part:
                        while chunk := part.read(_CHUNK):
                            member.write(chunk)
            with _member(archive, "arr_1.npy") as member:
                np.lib.format.write_array(member, self._labels.astype(np.int64), version=(1, 0), allow_pickle=False)
            with _member(archive, f"{_INSIDE}.npy") as member:  # a file that is sent to somebody says itself what it holds
                text = json.dumps(json.loads(self._settings.read_text()))
                np.lib.format.write_array(member, np.array(text), version=(1, 0), allow_pickle=False)


class PictureFolder:
    """An `Output` of one PNG per sample; arguments as `NpzFile`."""

    def __init__(self, path: epath.PathLike, *, labels: Int[np.ndarray, "N"], batch_size: int):
        self.path = storage.absolute(path)
        self._settings = self.path / "settings.json"
        self._names = [f"{i:06d}_{label:04d}.png" for i, label in enumerate(labels)]
        self._batch_size = batch_size

    def open(self, settings: Mapping[str, Any]) -> None:
        """See `Output`."""
        begun = self.path.exists() and any(not child.name.endswith((".partial", ".writable")) for child in self.path.iterdir())
        require_folder(self.path)
        claim(self._settings, settings, begun=begun, out=self.path)

    def _of(self, batch: int) -> Sequence[str]:
        return self._names[batch * self._batch_size : (batch + 1) * self._batch_size]

    def finished(self, batch: int) -> bool:
        """See `Output`."""
        return all((self.path / name).exists() for name in self._of(batch))

    def write(self, batch: int, images: UInt8[np.ndarray, "B H W C"]) -> None:
        """See `Output`."""
        for name, image in zip(self._of(batch), images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="png")
            _write_whole(self.path / name, buffer.getvalue())

    def close(self) -> None:
        """See `Output`: nothing is left to do."""


def kind_of(out: str) -> str:
    """What --out asks for by its name, capitals or not: ".png" (a picture), ".npz", or "" (a directory of pictures).

    Raises:
        UserError: it is named like a file of another kind, or exists as another kind of thing.
    """
    kind = storage.suffix_of(out)
    if not kind:
        storage.require_folder_name(out, flag="--out")
    elif kind not in (".png", ".npz"):
        raise UserError(
            f"--out={out}: samples come as FILE.png (a row per class), FILE.npz or a directory of PNGs, not as {kind}"
        )
    else:
        storage.require_file_name(out, flag="--out", suffix=kind)
    return kind


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """What the samples at FILE.npz or DIR were made with; empty where nothing says so (a file from elsewhere)."""
    path = storage.absolute(path)
    texts: list[str | bytes] = [_settings_inside(path)] if path.is_file() else []
    beside = path / "settings.json" if path.is_dir() else path.parent / f"{path.name}.json"
    texts += [beside.read_bytes()] if beside.is_file() else []
    for text in texts:
        try:
            settings = json.loads(text)
        except ValueError:  # another program's
            continue
        if isinstance(settings, dict):
            return settings
    return {}


def _settings_inside(path: epath.Path) -> str:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive, archive.open(f"{_INSIDE}.npy") as member:
            return str(np.lib.format.read_array(member, allow_pickle=False))
    except (KeyError, ValueError, zipfile.BadZipFile):
        return ""


def claim(file: epath.Path, settings: Mapping[str, Any], *, begun: bool, out: epath.Path) -> None:
    """Writes the settings, or compares them with those that the output was begun with.

    Args:
        file: where they lie.
        settings: JSON values.
        begun: whether there is output already.
        out: what a message calls it.

    Raises:
        UserError: if they differ, naming what does.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read
    if not file.exists():
        if begun:
            raise UserError(f"--out={out} exists but was not made by this command: choose another name or move it away")
        require_folder(file.parent)
        storage.write_text(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        old = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be read: move it away together with {out}") from error
    changed = sorted(key for key in {*old, *settings} if old.get(key) != settings.get(key))
    if changed:
        changes = ", ".join(f"{key}: {_short(old.get(key))} -> {_short(settings.get(key))}" for key in changed)
        raise UserError(f"--out={out} was begun with other settings ({changes}): choose another name or move it away")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def require_folder(folder: epath.Path) -> None:
    """Creates a folder and proves that a file can be written there.

    Raises:
        UserError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another --out") from error


def _write_whole(path: epath.Path, data: bytes) -> None:
    """Writes all of it under `path`, or nothing."""
    if not storage.is_local(path):  # an upload to a bucket is all or nothing
        path.write_bytes(data)
        return
    partial = path.parent / f".{path.name}.partial"
    with partial.open("wb") as file:
        file.write(data)
        _sync(file, partial)
    partial.replace(path)


def _sync(file: Any, path: epath.Path) -> None:
    file.flush()
    if storage.is_local(path):
        os.fsync(file.fileno())


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """A file inside the archive whose bytes do not depend on when it was made."""
    return archive.open(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)
