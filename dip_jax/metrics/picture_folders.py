"""A folder of pictures as a set of images: in the order of their names, labelled where the names are those of `sample`."""

import concurrent.futures
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from dip_jax.data import images
from dip_jax.errors import UserError
from dip_jax.metrics.image_sets import ImageSet

READERS = 16  # threads that read and decode images
_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_OURS = re.compile(r"\d{6,}_(\d{4,})\.png")  # how `sample` names sample and class
_SETTINGS = "settings.json"  # which `sample` writes beside its pictures


@dataclass(frozen=True)
class _Look:
    """What a file says before it is decoded."""

    size: tuple[int, int]  # width, height
    lossy: bool
    digest: bytes


def from_folder(path: str | os.PathLike) -> ImageSet:
    """The pictures that lie directly in a folder; they must be of one size, as pixels are compared and nothing is resized.

    Files whose names are no images' are left out, which a note says, as it says of JPEG and lossy WebP.

    Raises:
        UserError: there is no picture in the folder, or one is of another size or is none. A damaged one is found by `batches`.
    """
    folder = pathlib.Path(path)
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != _SETTINGS]
    folders = [entry.name for entry in visible if entry.is_dir()]
    files = [entry.name for entry in visible if not entry.is_dir()]
    names = [name for name in files if name.lower().endswith(_SUFFIXES)]
    if not names:
        raise UserError(_nothing(path, files, folders))
    looks = _look_at_all(folder, names)
    width, height = looks[0].size
    for name, look in zip(names, looks, strict=True):
        if look.size != (width, height):
            raise UserError(
                f"{path} holds images of several sizes: {names[0]} is {width}x{height}, {name} {look.size[0]}x{look.size[1]}; "
                f"move them into a sub-folder and crop them: python -m dip_jax prepare --source=folder --from={path} "
                "--image_size=N --out=ANOTHER_DIR"
            )

    def batches(size: int) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(names), size):
                yield np.stack(list(pool.map(lambda name: _read(folder / name), names[start : start + size])))

    digest = hashlib.sha256(b"".join(look.digest for look in looks)).hexdigest()
    left_out = [name for name in files if name not in set(names)]
    notes = _notes(
        path, lossy=[n for n, look in zip(names, looks, strict=True) if look.lossy], left_out=left_out, folders=folders
    )
    return ImageSet(os.fspath(path), len(names), (height, width, 3), batches, _labels(names), digest, tuple(notes))


def _nothing(path: str | os.PathLike, files: Sequence[str], folders: Sequence[str]) -> str:
    if folders:
        return (
            f"{path} holds no image itself but {len(folders)} folders ({folders[0]}, ...): name one of them, or make one set "
            f"of all: python -m dip_jax prepare --source=folder --from={path} --image_size=N --out=ANOTHER_DIR"
        )
    held = f"{len(files)} files such as {files[0]}" if files else "nothing"
    return f"{path} holds {held}, expected images ({', '.join(_SUFFIXES[:4])}, ...), or a dataset directory with dataset.json"


def _look_at_all(folder: pathlib.Path, names: Sequence[str]) -> list[_Look]:
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _look_at(folder / name), names)
        return list(tqdm(found, total=len(names), unit=" files", desc=f"looking at {folder.name}", leave=False, disable=None))


def _look_at(file: pathlib.Path) -> _Look:
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            lossy = image.format in ("JPEG", "MPO") or (image.format == "WEBP" and data[12:16] == b"VP8 ")
            return _Look(image.size, lossy, hashlib.sha256(data).digest())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is no image that Pillow reads ({error.__class__.__name__}): make or take it away") from None


def _read(file: pathlib.Path) -> np.ndarray:
    try:
        return np.asarray(images.decode(file.read_bytes()))
    except images.BadImageError as error:
        raise UserError(f"{file}: {error}: make it again") from None


def _labels(names: Sequence[str]) -> np.ndarray | None:
    found = [_OURS.fullmatch(name) for name in names]
    return np.array([int(match[1]) for match in found], np.int64) if all(found) else None


def _notes(path: str | os.PathLike, *, lossy: Sequence[str], left_out: Sequence[str], folders: Sequence[str]) -> Iterator[str]:
    if lossy:
        yield (
            f"{path}: {len(lossy)} images were compressed with loss ({lossy[0]}), which moves distances by more than models "
            "differ: save PNG or .npz."
        )
    if left_out:
        yield f"{path}: {len(left_out)} files are no images by their names and were left out ({left_out[0]})."
    if folders:
        yield f"{path}: {len(folders)} folders inside were left out ({folders[0]})."
