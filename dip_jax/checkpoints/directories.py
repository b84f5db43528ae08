"""Step directories on disk: which exist, which are undamaged, which are kept.

A step is `ROOT/NUMBER/` with `MANIFEST.sha256`, one line `DIGEST  NAME` per file as `sha256sum --check` reads it. Any file
missing, extra or changed is damage. A damaged step is moved to `ROOT/damaged/`, never deleted; a step that the keep policy
drops goes through `ROOT/todelete/`, so that a half-deleted one is never offered.

A bucket cannot rename. There a step is written in place and counts once its commit marker exists; it is withdrawn by deleting
the marker first, and moved by copying first.
"""

import concurrent.futures
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator

from etils import epath

from dip_jax.errors import UserError
from dip_jax.runtime import guard, writers

MANIFEST = "MANIFEST.sha256"
ROOT = "checkpoints"  # inside a workdir
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is being written
COMMIT = "commit_success.txt"  # the marker, by Orbax
LATE = (COMMIT, "_CHECKPOINT_METADATA")  # Orbax writes these after the manifest; no restore reads them
_NUMBER = re.compile(r"0|[1-9]\d*")
_CHUNK = 2**20  # small enough to stay in the core's cache between reading and hashing


def complete(root: epath.Path) -> list[int]:
    """Numbers of the steps under `root`, oldest first; not yet verified."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if _NUMBER.fullmatch(path.name) and _committed(path))


def _committed(path: epath.Path) -> bool:
    return guard.is_local(path) or (path / COMMIT).exists()


def newest(
    root: epath.Path, *, verify: bool, on_damage: Callable[[int, str], None], unread: Collection[str] = ()
) -> int | None:
    """The newest undamaged step; `on_damage(step, fault)` is called for each damaged one before it."""
    for step in reversed(complete(root)):
        fault = damage(root / str(step), unread=unread) if verify else None
        if fault is None:
            return step
        on_damage(step, fault)
    return None


def set_aside(root: epath.Path, step: int) -> epath.Path:
    """Moves a damaged step to `root/damaged/`, where nothing looks for steps, and returns its new place."""
    aside = root / "damaged"
    aside.mkdir(parents=True, exist_ok=True)
    names = (f"{step}{suffix}" for suffix in itertools.chain([""], (f".{n}" for n in itertools.count(2))))
    target = aside / next(name for name in names if not (aside / name).exists())
    if guard.is_local(root):
        (root / str(step)).rename(target)
        return target
    for name in _files(root / str(step)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (root / str(step) / name).copy(target / name)
    _delete(root, step)
    return target


def _delete(root: epath.Path, step: int) -> None:
    """Removes a step so that no half of it is ever offered, whenever this is cut short."""
    path = root / str(step)
    if guard.is_local(root):
        (root / "todelete").mkdir(exist_ok=True)
        path.rename(root / "todelete" / str(step))
    else:
        (path / COMMIT).unlink(missing_ok=True)
        path.rmtree()


def all_damaged(root: epath.Path) -> bool:
    """True where no step is left but damaged ones were set aside."""
    return not complete(root) and (root / "damaged").is_dir()


def best(root: epath.Path, *, metric: str) -> set[int]:
    """Of the steps on disk that were judged (rows of the workdir's `eval.jsonl`), the best one; empty where none was.

    Args:
        metric: fid or sfid (the lowest is best), is, precision or recall (the highest); also under a longer name (fid_lite0).
    """
    values = {
        row["step"]: value
        for row in writers.read_rows(root.parent / "eval.jsonl")
        for key, value in row.items()
        if (key == metric or key.startswith(f"{metric}_")) and value is not None
    }
    judged = [step for step in complete(root) if step in values]
    choose = min if metric in ("fid", "sfid") else max
    return {choose(judged, key=values.__getitem__)} if judged else set()


def prune(root: epath.Path, *, keep_last: int, keep_every: int, keep: Collection[int] = ()) -> None:
    """Deletes all steps but the last `keep_last`, those divisible by `keep_every` (0: none), and those in `keep`."""
    steps = complete(root)
    keep = {*keep, *steps[-keep_last:], *(step for step in steps if keep_every and step % keep_every == 0)}
    for step in steps:
        if step not in keep:
            _delete(root, step)
    clean(root, unfinished=False)


def clean(root: epath.Path, *, unfinished: bool = True) -> None:
    """Removes half-done deletions and, with `unfinished`, half-written steps of a run that was killed."""
    for path in root.iterdir():
        half_written = UNFINISHED in path.name or (_NUMBER.fullmatch(path.name) and not _committed(path))
        if path.name == "todelete" or (unfinished and half_written):
            path.rmtree()


def find(path: epath.PathLike, *, verify: bool, report: Callable[[str], None], unread: Collection[str] = ()) -> epath.Path:
    """The step directory that a workdir, its `checkpoints` directory or a step directory stands for. Changes nothing on disk.

    Args:
        path: any of these.
        verify: check the manifest.
        report: called with one line for each damaged step that is passed over.
        unread: items that the caller will not read, and that need no check.

    Raises:
        UserError: if there is none, or none is undamaged.
    """
    path = guard.absolute(path)
    wanted = "give a workdir or one of its checkpoints/STEP directories"
    if not _is_dir(path):
        raise UserError(f"{path} {other_formats.describe(path) if path.exists() else 'is no directory'}: {wanted}")
    if (path / "config").is_dir() or (path / MANIFEST).exists():
        if verify and (fault := damage(path, unread=unread)):
            raise UserError(f"{path} is damaged ({fault}): use another step of the same workdir")
        return path
    root = path / ROOT if (path / ROOT).is_dir() else path
    if not complete(root):
        raise UserError(f"{path} holds no checkpoint, it {other_formats.describe(root)}: {wanted}")
    step = newest(
        root,
        verify=verify,
        on_damage=lambda step, fault: report(f"checkpoint {step} is damaged ({fault}): using the one before"),
        unread=unread,
    )
    if step is None:
        raise UserError(f"every checkpoint under {root} is damaged")
    return root / str(step)


def _is_dir(path: epath.Path) -> bool:
    try:
        return path.is_dir()
    except ImportError as error:
        raise UserError(f"{path} lies in a bucket, and reading those needs another package: pip install gcsfs") from error


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
    guard.write_text(path / MANIFEST, "".join(lines))


def _digests(path: epath.Path, *, unread: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below, by relative name; in parallel, the largest first, so that no core is left with it alone."""
    names = [name for name in _files(path) if name not in (MANIFEST, *LATE) and name.split("/")[0] not in unread]
    names.sort(key=lambda name: (path / name).stat().length, reverse=True)
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(path / name), names), strict=True))


def _files(path: epath.Path, prefix: str = "") -> Iterator[str]:
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        else:
            yield f"{prefix}{child.name}"


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
