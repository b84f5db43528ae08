"""What XLA compiled, kept for the user's next command: JAX's persistent cache in a folder of ours, with a limit.

JAX's own limit (JAX_COMPILATION_CACHE_MAX_SIZE) locks the folder for every read and needs one more package, so the folder is
swept here instead, once when a command starts: entries that are damaged go, then the longest unused until the rest fits.
Processes may share it: JAX reads an entry or compiles anew, whatever it finds, and what one process removes another compiles.
"""

import contextlib
import os
import pathlib
import stat
import warnings
import zlib

import jax

from dip_jax.runtime import storage

LIMIT = 2 * 2**30  # bytes, when a command starts; an entry of a large model has 1 to 20 MB
_SWEPT = "swept"  # its time is that of the last sweep: what is older was found whole


def default_folder() -> pathlib.Path:
    """The user's folder of compiled programs."""
    return pathlib.Path(storage.cache_folder(), "xla")


def keep() -> None:
    """Makes JAX keep what it compiles, unless the user has said where (or that it should not).

    JAX_COMPILATION_CACHE_DIR names another folder, which is then left to its owner; JAX_ENABLE_COMPILATION_CACHE=false keeps
    nothing. A folder that cannot be written, or that another user could write, is not used: entries are run as they are found.
    """
    folder = default_folder()
    chosen = jax.config.jax_compilation_cache_dir
    if chosen is not None and pathlib.Path(chosen) != folder:
        return
    if not jax.config.jax_enable_compilation_cache or not _is_ours(folder):
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # that costs time alone
    if jax.config.jax_compilation_cache_max_size == -1:  # else JAX sweeps
        sweep(folder, limit=LIMIT)


def _is_ours(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH and os.access(folder, os.W_OK | os.X_OK)


def sweep(folder: pathlib.Path, *, limit: int) -> None:
    """Removes entries that were cut off, by a full disk or a kill, and then the longest unused down to `limit` bytes."""
    with contextlib.suppress(OSError):  # what cannot be looked at or removed costs space or time, not the command
        stamp = folder / _SWEPT
        since = stamp.stat().st_mtime if stamp.exists() else 0.0
        stamp.touch()
        entries = {path: found for path in folder.glob("*-cache") if (found := _look(path)) is not None}
        for path in [path for path, found in entries.items() if found.st_mtime >= since and not _is_whole(path)]:
            _remove(path)
            del entries[path]
        total = sum(found.st_size for found in entries.values())
        for path, found in sorted(entries.items(), key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime)):
            if total <= limit:
                return
            _remove(path)
            total -= found.st_size


def _look(path: pathlib.Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # another process may have removed it
        return path.stat()
    return None


def _is_whole(path: pathlib.Path) -> bool:
    """Whether the entry's compression ends as it should; of what is not zlib's we cannot say, and JAX looks at it."""
    data = path.read_bytes()
    if data and data[0] != 0x78:
        return True
    try:
        reader = zlib.decompressobj()
        reader.decompress(data)
        return reader.eof
    except zlib.error:
        return False


def _remove(path: pathlib.Path) -> None:
    for file in (path, path.with_name(path.name.removesuffix("-cache") + "-atime")):
        file.unlink(missing_ok=True)
