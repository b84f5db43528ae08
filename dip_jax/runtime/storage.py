"""Paths on a disk or in a bucket: whole files or nothing, and room for them."""

import os
import shutil

from etils import epath

from dip_jax.errors import UserError


def is_local(path: epath.PathLike) -> bool:
    """True where the path lies on a file system that renames atomically; False for a bucket (gs://, s3://)."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with ~ expanded and independent of the current directory; bucket addresses as they are."""
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a whole file or nothing: a reader never sees half of it, also after a kill.

    On a local disk by writing beside it, syncing and renaming; in a bucket a single upload is already all or nothing.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def require_writable(workdir: epath.Path) -> None:
    """Creates the directory and proves that a file can be written there.

    Raises:
        UserError: if not.
    """
    probe = workdir / f".writable-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror or error}): choose another or free it") from error


def require_space(path: epath.Path, needed: int) -> None:
    """Checks that the disk holding `path` has `needed` bytes free. Buckets have no end.

    Raises:
        UserError: with both numbers in GiB.
    """
    if not is_local(path):
        return
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"{path} has {free / 2**30:.2f} GiB free but needs {needed / 2**30:.2f} GiB: free some space, "
            "then run the same command again"
        )
