"""Paths on a disk or in a bucket: whole files or nothing, and room for them."""

import hashlib
import os
import re
import shutil

from etils import epath

from dip_jax.errors import UserError

# What names end in that are meant as files: a directory of such a name would be a misunderstanding.
_FILES = re.compile(
    r"\.(avi|bin|bmp|ckpt|csv|gif|gz|h5|html|jpe?g|json|jxl|mp4|np[yz]|parquet|pb|pdf|pickle|pkl|png|pth?|safetensors|svg|tar|tfrecord"
    r"|tgz|tiff?|txt|webp|ya?ml|zip|zst)$"
)


# What addresses on the Hugging Face Hub begin with: whole releases are fetched and given there, nothing is written.
HUB = "hf://"


def is_on_hub(path: epath.PathLike) -> bool:
    """True for an address on the Hugging Face Hub (`checkpoints/hub.py`)."""
    return os.fspath(path).startswith(HUB)


def require_no_hub(path: epath.PathLike, *, flag: str) -> None:
    """Checks that what will be written to is no address on a hub.

    Raises:
        UserError: if it is.
    """
    if is_on_hub(path):
        raise UserError(
            f"{flag}={os.fspath(path)} cannot be written to: a hub holds whole releases, name a directory or a bucket"
        )


def is_local(path: epath.PathLike) -> bool:
    """True where the path lies on a file system that renames atomically; False for a bucket (gs://, s3://)."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with ~ expanded and independent of the current directory; bucket addresses as they are."""
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def cache_folder() -> str:
    """The user's folder for what can be made again; a relative $XDG_CACHE_HOME does not count, as its standard says."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(home if os.path.isabs(home) else os.path.expanduser("~/.cache"), "dip_jax")


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


def file_digest(path: epath.PathLike) -> str:
    """SHA-256 of a file, hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def suffix_of(path: epath.PathLike) -> str:
    """What makes a name that of a file: ".png" of "a.PNG"; "" where nothing does, as of "runs/a", "a/" or "guidance_4.0"."""
    found = _FILES.search(os.fspath(path).lower())
    return found.group() if found else ""


def require_file_name(path: epath.PathLike, *, flag: str, suffix: str | tuple[str, ...]) -> None:
    """Checks that an output is named as a file of its kind (by one of the suffixes), capitals or not, and is no directory.

    Raises:
        UserError: if not.
    """
    name = os.fspath(path)
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    if suffix_of(name) not in suffixes:
        raise UserError(f"{flag}={name} must end in {' or '.join(suffixes)}, which is what is written")
    if absolute(path).is_dir():
        raise UserError(f"{flag}={name} is a directory where a file is to be written: choose another name, or move it away")


def require_folder_name(path: epath.PathLike, *, flag: str) -> None:
    """Checks that an output can be a directory: that no file has that name, that it is not named like one, nor on a hub.

    Raises:
        UserError: if not.
    """
    name = os.fspath(path)
    require_no_hub(path, flag=flag)
    if suffix := suffix_of(name):
        raise UserError(f"{flag}={name} is to be a directory: name it without {suffix}")
    if absolute(path).is_file():
        raise UserError(f"{flag}={name} is a file where a directory is to be made: choose another name, or move it away")


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
