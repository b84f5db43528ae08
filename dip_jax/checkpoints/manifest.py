"""The SHA-256 manifest of a step: where a flipped bit is noticed.

`MANIFEST.sha256` has one line `DIGEST  NAME` per file, as `sha256sum --check` reads it. Any file missing, extra or changed is
damage.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Collection, Iterator

from etils import epath

from dip_jax.runtime import storage

MANIFEST = "MANIFEST.sha256"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is being written
COMMIT = "commit_success.txt"  # the marker, by Orbax
LATE = (COMMIT, "_CHECKPOINT_METADATA")  # Orbax writes these after the manifest; no restore reads them
_CHUNK = 2**20  # small enough to stay in the core's cache between reading and hashing


def damage(path: epath.Path, *, unread: Collection[str] = ()) -> str | None:
    """What is wrong with a step by its manifest, in a few words; None where every file is as it was written.

    Args:
        path: the step directory.
        unread: items that need no check, because nobody will read them.
    """
    try:
        lines = (path / MANIFEST).read_text().splitlines()
        listed = [line.split("  ", 1) for line in lines]
        expected = {name: digest for digest, name in listed if name.split("/")[0] not in unread}
        actual = _digests(path, unread=unread)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:
        return f"{MANIFEST} is unreadable"
    for fault, names in (
        ("missing", expected.keys() - actual.keys()),
        ("not in the manifest", actual.keys() - expected.keys()),
        ("not what was written", {name for name in expected.keys() & actual.keys() if expected[name] != actual[name]}),
    ):
        if names:
            return f"{min(names)} is {fault}"
    return None


def write_manifest(path: epath.Path) -> None:
    """Hashes the step that is about to be committed as `path`; call it when its last file is written."""
    unfinished = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}{UNFINISHED}")]
    path = unfinished[0] if unfinished else path
    lines = [f"{digest}  {name}\n" for name, digest in sorted(_digests(path).items())]
    storage.write_text(path / MANIFEST, "".join(lines))


def _digests(path: epath.Path, *, unread: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below, by relative name; in parallel, the largest first, so that no core is left with it alone."""
    names = [name for name in files_below(path) if name not in (MANIFEST, *LATE) and name.split("/")[0] not in unread]
    names.sort(key=lambda name: (path / name).stat().length, reverse=True)
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(path / name), names), strict=True))


def files_below(path: epath.Path, prefix: str = "") -> Iterator[str]:
    for child in path.iterdir():
        if child.is_dir():
            yield from files_below(child, f"{prefix}{child.name}/")
        else:
            yield f"{prefix}{child.name}"


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
