"""The manifest of a step: where a flipped bit is noticed.

`MANIFEST.xxh128` has one line `DIGEST  NAME` per file of the items; the file's own name tells the hash. Any such file missing,
extra or changed is damage. XXH3-128 finds accidents at the speed of memory. A release has SHA-256 (`MANIFEST.sha256`), which
finds forgeries too, as have steps of before XXH3 and of hosts without the package xxhash.

    python -m dip_jax.checkpoints.manifest PATH...    verifies workdirs, steps and releases; touches no JAX
"""

import concurrent.futures
import fnmatch
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from dip_jax.errors import Exit, UserError
from dip_jax.runtime import storage

try:
    import xxhash
except ImportError:  # a host that only reads may do without
    xxhash = None

SHA256 = "MANIFEST.sha256"  # `sha256sum --check` reads it
XXH128 = "MANIFEST.xxh128"  # `xxhsum --check` reads it
MANIFEST = XXH128 if xxhash else SHA256  # what a step gets
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is being written
COMMIT = "commit_success.txt"  # the marker, by Orbax: of a step and of its items, in some releases and on some storage only
LATE = (COMMIT, "_CHECKPOINT_METADATA")  # Orbax writes these after the manifest; no restore reads them
ITEMS = ("state", "ema", "ema_[0-9]*", "config")  # the folders of a step that are read, as patterns
_CHUNK = 2**20  # small enough to stay in the core's cache between reading and hashing


def damage(path: epath.Path, *, unread: Collection[str] = ()) -> str | None:
    """What is wrong with a step by its manifest, in a few words; None where every file is as it was written.

    Args:
        path: the step directory.
        unread: items that need no check, because nobody will read them.

    Raises:
        UserError: if the manifest's hash needs a package that is not installed.
    """
    try:
        manifest = find_manifest(path)
        if manifest is None:
            return f"{MANIFEST} is missing"
        lines = (path / manifest).read_text().splitlines()
        listed = [line.split("  ", 1) for line in lines]
        expected = {name: digest for digest, name in listed if _counts(name, unread)}
        actual = _digests(path, _hash_of(manifest), unread=unread)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:
        return f"{manifest} is unreadable"
    outside = [name for _, name in listed if name.startswith("/") or ".." in name.split("/")]
    if outside:
        return f"{manifest} names {outside[0]}, which lies outside the step"
    for fault, names in (
        ("missing", expected.keys() - actual.keys()),
        ("not in the manifest", actual.keys() - expected.keys()),
        ("not what was written", {name for name in expected.keys() & actual.keys() if expected[name] != actual[name]}),
    ):
        if names:
            return f"{min(names)} is {fault}"
    return None


def find_manifest(path: epath.Path) -> str | None:
    """The name of a step's manifest; None where it has none."""
    return next((name for name in (XXH128, SHA256) if (path / name).exists()), None)


def unfinished(path: epath.Path) -> epath.Path:
    """Where the step that is about to be committed as `path` lies now."""
    found = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}{UNFINISHED}")]
    return found[0] if found else path


def write_manifest(path: epath.Path, *, name: str = MANIFEST) -> None:
    """Hashes the step that is about to be committed as `path`; call it when its last file is written.

    Args:
        path: the step.
        name: `XXH128` or `SHA256`.
    """
    path = unfinished(path)
    lines = [f"{digest}  {file}\n" for file, digest in sorted(_digests(path, _hash_of(name)).items())]
    storage.write_text(path / name, "".join(lines))


def _hash_of(manifest: str) -> Callable[[], Any]:
    if manifest == SHA256:
        return hashlib.sha256
    if xxhash is None:
        raise UserError(f"verifying a {XXH128} needs another package: pip install xxhash")
    return xxhash.xxh3_128


def _counts(name: str, unread: Collection[str]) -> bool:
    """Whether a file's bytes matter: it belongs to an item that will be read, and is no marker.

    What lies beside the items (a model card, a report, samples, what a hub or a copying tool puts there) nothing reads.
    """
    item, _, rest = name.partition("/")
    return bool(rest) and any(fnmatch.fnmatchcase(item, pattern) for pattern in ITEMS) and item not in unread and rest != COMMIT


def _digests(path: epath.Path, new: Callable[[], Any], *, unread: Collection[str] = ()) -> dict[str, str]:
    """The digest of every file that counts, by relative name; in parallel, the largest first, so that no core ends alone."""
    names = [name for name in files_below(path) if _counts(name, unread)]
    names.sort(key=lambda name: (path / name).stat().length, reverse=True)
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(path / name, new()), names), strict=True))


def files_below(path: epath.Path, prefix: str = "") -> Iterator[str]:
    for child in path.iterdir():
        if child.is_dir():
            yield from files_below(child, f"{prefix}{child.name}/")
        else:
            yield f"{prefix}{child.name}"


def _digest(path: epath.Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _steps(path: epath.Path) -> list[epath.Path]:
    """What a path stands for: itself where it is a step or a release, else every step of the workdir."""
    if find_manifest(path) or (path / "config").is_dir():
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [child for child in root.iterdir() if child.name.isdecimal()] if root.is_dir() else []
    if not steps:
        raise UserError(f"{path} holds no checkpoint: give a workdir, one of its checkpoints/STEP directories, or a release")
    return sorted(steps, key=lambda step: int(step.name))


def main(arguments: list[str]) -> int:
    """Verifies each path, a line per step on stdout; 0 where all are as they were written, 1 where one is not."""
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("usage: python -m dip_jax.checkpoints.manifest PATH...")
        code = Exit.DONE
        for step in [step for argument in arguments for step in _steps(storage.absolute(argument))]:
            fault = damage(step)
            print(f"{step}: {f'damaged, {fault}' if fault else 'as it was written'}")
            code = Exit.CRASH if fault else code
    except UserError as error:
        print(f"dip_jax: {error}", file=sys.stderr)
        return Exit.USER_ERROR
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
