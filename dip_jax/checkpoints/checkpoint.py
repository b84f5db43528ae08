"""Checkpoints: the only file that knows Orbax.

A step directory `WORKDIR/checkpoints/STEP` holds three items, each readable without the others, and their hashes:

    state/           step, params, opt_state: what training goes on from
    ema/             the averaged weights: what everybody else wants
    config/          JSON: the config, what the data order depends on, counters
    MANIFEST.sha256  written last, inside the same atomic commit

Restore order:

 1. List the directories named by a number, newest first. Unfinished ones have other names and are removed at start.
 2. Hash every file and compare with the manifest. A missing, extra or changed file is damage: the step is reported, moved to
    `checkpoints/damaged/` (never deleted), and the next older one is tried.
 3. Nothing left and nothing damaged: training starts at step 0. Nothing left but damaged steps: stop, the user decides.
 4. Read `config`. The caller refuses another config or other data here, before anything is compiled.
 5. Compare every leaf of `state` and `ema` with the target: names, shapes, dtypes. A difference is an error listing leaves.
 6. Read the arrays straight onto the target's shardings, whatever mesh or host count wrote them.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dip_jax.checkpoints import directories, manifest, mismatch, orbax_logging
from dip_jax.config import Checkpoint, Config, from_dict, to_dict
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.models import dip
from dip_jax.runtime import distributed, storage
from dip_jax.typing import Params

_FILE_BYTES = 2**26  # one file is hashed by one core: many of middling size keep all cores busy
ITEMS_UNREAD = {"ema": ("state",), "raw": ("ema",), "initial": ("state", "ema")}  # by weights of `load`


@dataclasses.dataclass(frozen=True)
class Record:
    """The `config` item: everything about a run that is not an array."""

    config: Config
    data: dict[str, Any]  # `data.order.identity`, and the teacher; empty for converted weights
    skipped: int = 0  # updates not applied because of a non-finite number, so far
    replaced: int = 0  # bad records replaced by a neighbour, so far


@dataclasses.dataclass(frozen=True)
class Found:
    """An undamaged step and its record."""

    step: int
    path: epath.Path
    record: Record


class Checkpoints:
    """The checkpoints of one workdir: asynchronous atomic saves, verified restores, old steps deleted.

    Args:
        workdir: made absolute; created where missing.
        options: whether to verify, what to keep.
        report: called with one line for each damaged step; prints to stderr by default.

    Raises:
        UserError: if the workdir cannot be written.
    """

    def __init__(self, workdir: epath.PathLike, options: Checkpoint, *, report: Callable[[str], None] | None = None):
        orbax_logging.quieten_orbax()
        self.root = storage.absolute(workdir) / directories.ROOT
        self._options = options
        self._report = report or distributed.say
        self._current = self.root  # the step being written
        self._saving: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writer = _async_writer(lambda: manifest.write_manifest(self._current))
        if jax.process_index() == 0:
            storage.require_writable(self.root)
            directories.clean(self.root)

    def find(self) -> Found | None:
        """The newest undamaged step (1 to 4 of the restore order); None where training starts at step 0.

        Raises:
            UserError: if every step is damaged, or the record cannot be understood.
        """
        step = None
        if jax.process_index() == 0:
            step = directories.newest(self.root, verify=self._options.verify, on_damage=self._set_aside)
        step = distributed.agree(-1 if step is None else step)
        if step >= 0:
            path = self.root / str(step)
            return Found(step, path, read_record(path))
        if directories.all_damaged(self.root):
            raise UserError(
                f"no undamaged checkpoint is left under {self.root}: the damaged ones are in its directory damaged/; "
                "move that away to start again from step 0"
            )
        return None

    def _set_aside(self, step: int, fault: str) -> None:
        place = directories.set_aside(self.root, step)
        self._report(f"checkpoint {step} is damaged ({fault}): moved to {place}, trying the one before")

    def restore(self, found: Found, target: Any, *, partial: bool = False) -> Any:
        """Reads the arrays of a found step (5 and 6 of the restore order).

        Args:
            found: from `find`.
            target: a `TrainState` of `jax.ShapeDtypeStruct` with shardings, of any mesh; `partial`: less than was saved.

        Raises:
            UserError: if names, shapes or dtypes differ from the target, listing leaves.
        """
        ema = _read(found.path / "ema", target.ema)
        return target.replace(**_read(found.path / "state", _state(target), partial=partial), ema=ema)

    def save(self, step: int, state: Any, record: Record) -> None:
        """Starts a save and returns once the arrays are copied off the devices. Does nothing where the step exists.

        Raises:
            UserError: if the disk is too full or the save before this one failed, naming the last good step.
            Interrupted: with `Exit.CRASH`, if it failed because another process or a device is gone.
        """
        self.wait()
        if (self.root / str(step)).exists():
            return
        storage.require_space(self.root, int(1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))))
        self._current = self.root / str(step)
        items = {"state": _arrays_item(_state(state)), "ema": _arrays_item(state.ema), "config": _config_item(record)}
        try:
            self._writer.save(self._current, args=ocp.args.Composite(**items))
        except OSError as error:
            raise self._failure(error) from error
        self._saving = self._thread.submit(self._finish)

    def _finish(self) -> None:
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            options = self._options
            keep = directories.best(self.root, metric=options.keep_best) if options.keep_best else ()
            directories.prune(self.root, keep_last=options.keep_last, keep_every=options.keep_every, keep=keep)

    def check(self) -> None:
        """Whether a background save failed; costs nothing, so call it after every step.

        Raises:
            UserError: if one did, naming the last good step.
        """
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises as `check`."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as error:  # a full disk comes wrapped in many types
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> UserError | Interrupted:
        good = directories.complete(self.root)
        last = f"the last good one is step {good[-1]}" if good else "there is no earlier one"
        failure = f"saving {self._current} failed ({_reason(error)}); {last}"
        if isinstance(_cause(error), jax.errors.JaxRuntimeError):  # another process or a device is gone: nothing to mend here
            return Interrupted(f"{failure}; run the same command again", code=Exit.CRASH)
        return UserError(f"{failure}; mend this, then run the same command again")

    def close(self) -> None:
        """Waits for the save under way and frees the threads; raises as `check`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()


def load(path: epath.PathLike, *, weights: str = "ema", dtype: str | None = None, verify: bool = True) -> tuple[Any, Params]:
    """A trained model and its weights; needs no config, mesh or optimizer.

    Args:
        path: a workdir (its newest undamaged step is used), a step directory, or what `convert` wrote.
        weights: "ema" (what samples are drawn from), "raw" (the last update), "initial" (step 0, by seed and `init_from`).
        dtype: what the model computes in, "float32" or "bfloat16"; as it was trained where it is not given.
        verify: check by the SHA-256 manifest what will be read, first.

    Returns:
        The model, and a nested dict of float32 arrays.

    Raises:
        UserError: if there is no checkpoint, it is damaged, it lacks the weights asked for, or there is no such `dtype`.
    """
    orbax_logging.quieten_orbax()
    if weights not in ITEMS_UNREAD:
        raise UserError(f"weights={weights!r} is unknown: it is one of {', '.join(ITEMS_UNREAD)}")
    path = directories.find(path, verify=verify, report=distributed.say, unread=ITEMS_UNREAD[weights])
    record = read_record(path)
    model = dip.from_config(dataclasses.replace(record.config.model, dtype=dtype or record.config.model.dtype))
    if weights == "initial":
        params = jax.jit(model.init)(jax.random.key(record.config.train.seed))
        origin = record.config.train.init_from
        return model, dip.init_backbone(params, load(origin)[1]) if origin else params
    params = jax.eval_shape(model.init, jax.random.key(0))
    if weights == "ema":
        return model, _read(path / "ema", params)
    return model, _read(path / "state", {"params": params}, partial=True)["params"]


def read_record(path: epath.Path) -> Record:
    """The `config` item of a step directory.

    Raises:
        UserError: if it is missing, or was written with options that this version does not know.
    """
    try:
        values = json.loads((path / "config" / "metadata").read_text())
        replaced = int(values.get("replaced", 0))  # older checkpoints lack it
        return Record(from_dict(values["config"]), dict(values["data"]), int(values["skipped"]), replaced)
    except UserError as error:
        raise UserError(f"{path} was written with other options than this version knows: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no readable config item ({_reason(error)}): it is no dip_jax checkpoint") from error


def write_weights(workdir: epath.PathLike, params: Params, *, config: Config, step: int = 0) -> epath.Path:
    """Writes weights from elsewhere so that `load` reads them: the items `ema` and `config`, no `state`.

    Raises:
        UserError: if the step exists already or the directory cannot be written.
    """
    orbax_logging.quieten_orbax()
    root = storage.absolute(workdir) / directories.ROOT
    storage.require_writable(root)
    path = root / str(step)
    if path.exists():
        raise UserError(f"{path} exists already: choose another output directory")
    with _async_writer(lambda: manifest.write_manifest(path)) as writer:
        items = {"ema": _arrays_item(params), "config": _config_item(Record(config, {}))}
        writer.save(path, args=ocp.args.Composite(**items))
    return path


def _state(state: Any) -> dict[str, Any]:
    """The item `state` of a `TrainState`: all but the average."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _arrays_item(tree: Any) -> ocp.args.PyTreeSave:
    return ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=_FILE_BYTES)


def _config_item(record: Record) -> ocp.args.JsonSave:
    values = dataclasses.asdict(record) | {"config": to_dict(record.config)}
    return ocp.args.JsonSave(json.loads(json.dumps(values)))  # tuples as lists, as they will be read


def _async_writer(before_commit: Callable[[], None]) -> ocp.AsyncCheckpointer:
    options = ocp.AsyncOptions(post_finalization_callback=before_commit)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def _read(item: epath.Path, target: Any, *, partial: bool = False) -> Any:
    """Arrays of one item as `target` (a tree of `ShapeDtypeStruct`, on the default device where it names no sharding)."""
    if not item.is_dir():
        there = sorted(child.name for child in item.parent.iterdir() if child.is_dir())
        instead = ": converted and copied weights are often these alone, load them with weights='ema'" if "ema" in there else ""
        raise UserError(f"{item.parent} holds no item {item.name!r}, only {', '.join(there)}{instead}")
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or local), target)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            stored = reader.metadata(item).item_metadata.tree
            if difference := mismatch.describe(stored, target, partial=partial):
                raise UserError(f"{item} does not fit this model: {difference}")
            restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=partial)
            return reader.restore(item, args=args)
    except UserError:
        raise
    except Exception as error:  # Orbax and its storage report what they cannot read by many types
        raise UserError(f"{item} cannot be read ({_reason(error)}): use another step of the same workdir") from error


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    error = _cause(error)
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
