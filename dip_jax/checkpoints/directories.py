"""Step directories on disk: which exist, which are undamaged, which are kept.

A step is `ROOT/NUMBER/`; whether it is undamaged its manifest tells (`checkpoints/manifest.py`). A damaged step is moved to
`ROOT/damaged/`, never deleted; a step that the keep policy drops goes through `ROOT/todelete/`, so that a half-deleted one is
never offered.

A bucket cannot rename. There a step is written in place and counts once its manifest or its commit marker exists, which are
written last; it is withdrawn by deleting these first, and moved by copying first.
"""

import itertools
import re
from collections.abc import Callable, Collection

from etils import epath

from dip_jax.checkpoints import hub, other_formats
from dip_jax.checkpoints.manifest import COMMIT, SHA256, UNFINISHED, XXH128, damage, files_below, find_manifest
from dip_jax.errors import UserError
from dip_jax.runtime import storage, writers

ROOT = "checkpoints"  # inside a workdir
_NUMBER = re.compile(r"0|[1-9]\d*")


def complete(root: epath.Path) -> list[int]:
    """Numbers of the steps under `root`, oldest first; not yet verified."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if _NUMBER.fullmatch(path.name) and _committed(path))


def _committed(path: epath.Path) -> bool:
    """Whether a step is whole: always on a disk; in a bucket by Orbax's marker or, copied there from a disk, the manifest."""
    return storage.is_local(path) or (path / COMMIT).exists() or find_manifest(path) is not None


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
    if storage.is_local(root):
        (root / str(step)).rename(target)
        return target
    for name in files_below(root / str(step)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (root / str(step) / name).copy(target / name)
    _delete(root, step)
    return target


def _delete(root: epath.Path, step: int) -> None:
    """Removes a step so that no half of it is ever offered, whenever this is cut short."""
    path = root / str(step)
    if storage.is_local(root):
        (root / "todelete").mkdir(exist_ok=True)
        path.rename(root / "todelete" / str(step))
    else:
        for name in (SHA256, XXH128, COMMIT):
            (path / name).unlink(missing_ok=True)
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
    """The step directory that a workdir, its `checkpoints` directory or a step directory stands for, or an address on the hub.

    Nothing is changed on disk but the hub's cache.

    Args:
        path: any of these.
        verify: check the manifest.
        report: called with one line for each damaged step that is passed over.
        unread: items that the caller will not read, and that need no check.

    Raises:
        UserError: if there is none, or none is undamaged.
    """
    if storage.is_on_hub(path):
        return hub.fetch(path, verify=verify, unread=unread)
    path = storage.absolute(path)
    wanted = "give a workdir or one of its checkpoints/STEP directories"
    if not _is_dir(path):
        raise UserError(f"{path} {other_formats.describe(path) if path.exists() else 'is no directory'}: {wanted}")
    if (path / "config").is_dir() or find_manifest(path):
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
