"""Images and statistics in .npz files from any framework: read as a stream and never unpickled."""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from dip_jax.errors import UserError
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile, explain, is_pixels
from dip_jax.metrics.statistics import Gaussian
from dip_jax.runtime import storage

_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of an ADM reference file: pool and spatial features
_LOOKED_AT = 1 << 28  # bytes of an array of another dtype that are searched for its lowest and highest value


def from_npz(path: str | os.PathLike) -> ImageSet:
    """The images of an .npz file in ADM's format: arr_0 uint8 [N, H, W, 3] and, if there, arr_1 integer labels [N].

    Raises:
        UserError: the file is missing or damaged, or arr_0 is missing, empty, pickled, of another dtype or shape; or the
            labels are not N integers. The pixels themselves are read, and their checksum checked, by `batches`.
    """
    with _open(path) as archive:
        shape = _images_header(path, archive)
        labels = None
        if "arr_1.npy" in archive.namelist():
            labels = _array(path, archive, "arr_1")
            if labels.shape != (shape[0],) or labels.dtype.kind not in "iu":
                raise UserError(
                    f"{path}: arr_1 holds {labels.dtype} {list(labels.shape)}, expected {shape[0]} integer labels, "
                    "one per image of arr_0"
                )

    def batches(size: int) -> Iterator[np.ndarray]:
        with _open(path) as archive, archive.open("arr_0.npy") as member:
            _header(path, "arr_0", member)
            for start in range(0, shape[0], size):
                rows = min(size, shape[0] - start)
                data = member.read(rows * math.prod(shape[1:]))
                if len(data) != rows * math.prod(shape[1:]):
                    raise UserError(f"{path}: arr_0 ends at image {start} of {shape[0]}: the file is truncated, make it again")
                yield np.frombuffer(data, np.uint8).reshape(rows, *shape[1:])

    return ImageSet(os.fspath(path), shape[0], shape[1:], batches, labels, storage.file_digest(path))


def read_reference(path: str | os.PathLike) -> ReferenceFile:
    """An .npz of images (arr_0), of ADM statistics (mu, sigma, mu_s, sigma_s), or of both.

    Raises:
        UserError: as `from_npz`; or some but not all of the statistics are there, or they do not fit together.
    """
    with _open(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        found = {name: _array(path, archive, name) for name in _STATISTICS if name in names}
    if "arr_0" not in names and not found:
        raise UserError(
            f"{path}: holds {', '.join(sorted(names)) or 'nothing'}; expected images (arr_0) or the statistics of an ADM "
            f"reference ({', '.join(_STATISTICS)})"
        )
    if found and len(found) < len(_STATISTICS):
        missing = [name for name in _STATISTICS if name not in found]
        raise UserError(
            f"{path}: the reference has {', '.join(found)} but not {', '.join(missing)}: use one of the ADM reference files, "
            "or images alone (arr_0)"
        )
    images = from_npz(path) if "arr_0" in names else None
    if not found:
        return ReferenceFile(os.fspath(path), images)
    pool, spatial = (_gaussian(path, found, suffix) for suffix in ("", "_s"))
    return ReferenceFile(os.fspath(path), images, pool, spatial)


def read_samples(path: str | os.PathLike) -> ImageSet | ReferenceFile:
    """The images of an .npz or, where it has none, the statistics of Inception features that somebody took of samples.

    Raises:
        UserError: as `from_npz` and `read_reference`.
    """
    with _open(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return read_reference(path) if "arr_0" not in names and names & set(_STATISTICS) else from_npz(path)


def _gaussian(path: Any, found: dict[str, np.ndarray], suffix: str) -> Gaussian:
    mean, covariance = (found[name + suffix] for name in ("mu", "sigma"))
    fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape and {mean.dtype.kind, covariance.dtype.kind} == {"f"}
    if not fits or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(
            f"{path}: mu{suffix} {mean.dtype} {list(mean.shape)} and sigma{suffix} {covariance.dtype} "
            f"{list(covariance.shape)} are not a finite mean [d] and covariance [d, d]; use one of the ADM reference files"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; expected an .npz with uint8 images in arr_0")
    with file.open("rb") as f:
        if f.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise UserError(
                f"{path}: a single array (.npy), expected an .npz: save it with np.savez(FILE, np.load({str(path)!r}))"
            )
        try:
            with zipfile.ZipFile(f) as archive:
                yield archive
        except (zipfile.BadZipFile, EOFError, zipfile.zlib.error, NotImplementedError) as error:
            raise UserError(f"{path}: not an .npz file, or a damaged one ({error}); make it again") from error


def _header(path: Any, name: str, member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, fortran order, dtype) of an .npy stream, which is left at its first value."""
    try:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        return read(member)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {name} is not an array written by numpy ({error}); make the file again") from error


def _images_header(path: Any, archive: zipfile.ZipFile) -> tuple[int, int, int, int]:
    if "arr_0.npy" not in archive.namelist():
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        again = f": save them with np.savez(FILE, {names[0]})" if len(names) == 1 else ""
        raise UserError(f"{path}: holds {', '.join(names) or 'nothing'}; expected images under the name arr_0{again}")
    with archive.open("arr_0.npy") as member:
        shape, fortran, dtype = _header(path, "arr_0", member)
        start = member.tell()
        if dtype.hasobject:
            raise UserError(f"{path}: arr_0 holds pickled Python objects, which are never loaded; expected uint8 [N, H, W, 3]")
        whole = archive.getinfo("arr_0.npy").file_size == start + math.prod(shape) * dtype.itemsize
        if not whole:
            raise UserError(f"{path}: arr_0 does not hold the {list(shape)} values that it announces; make the file again")
        if not is_pixels(dtype, shape):
            raise UserError(f"{path}: {explain('arr_0', dtype, shape, extremes=_extremes(member, dtype))}")
    if fortran:
        raise UserError(f"{path}: arr_0 {list(shape)} lies in Fortran order: save np.ascontiguousarray(arr_0)")
    return shape


def _extremes(member: Any, dtype: np.dtype) -> tuple[float, float] | None:
    """The lowest and the highest of the values that begin an .npy stream; None where they are no numbers."""
    values = np.frombuffer(member.read(_LOOKED_AT // dtype.itemsize * dtype.itemsize), dtype)
    return (float(values.min()), float(values.max())) if values.size and dtype.kind in "iuf" else None


def _array(path: Any, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: {name} cannot be read ({error}); expected a plain array of numbers") from error
