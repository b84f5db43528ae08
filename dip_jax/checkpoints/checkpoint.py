"""Checkpoints: what a step directory is, and the order of a restore.

A step directory `WORKDIR/checkpoints/STEP` holds three items or more, each readable without the others, and their hashes:

    state/           step, params, opt_state: what training goes on from
    ema/             the averaged weights: what everybody else wants; with several decays also ema_1/, ema_2/, …
    config/          JSON: the config, what the data order depends on, counters
    MANIFEST.xxh128  written last, inside the same atomic commit

Restore order:

 1. List the directories named by a number, newest first. Unfinished ones have other names and are removed at start.
 2. Hash every file and compare with the manifest. A missing, extra or changed file is damage: the step is reported, moved to
    `checkpoints/damaged/` (never deleted), and the next older one is tried.
 3. Nothing left and nothing damaged: training starts at step 0. Nothing left but damaged steps: stop, the user decides.
 4. Read `config`. The caller refuses another config or other data here, before anything is compiled.
 5. Compare every leaf with the target: names, shapes, dtypes. A difference is an error listing leaves.
 6. Read the arrays straight onto the target's shardings, whatever mesh or host count wrote them.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dip_jax.checkpoints import averages, directories, items, manifest, orbax_logging
from dip_jax.checkpoints.items import Record, read_record
from dip_jax.config import Checkpoint, Config, Train
from dip_jax.config.checks import one_of
from dip_jax.errors import Exit, Interrupted, UserError, cause, reason
from dip_jax.models import asym, dip, starting
from dip_jax.runtime import distributed, sharding, storage, target
from dip_jax.typing import Params

NAMES, ITEMS_UNREAD = averages.NAMES, averages.UNREAD  # by weights of `load`


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
        self._writer = items.open_writer(lambda: manifest.write_manifest(self._current))
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

    def restore(self, found: Found, target: Any, *, partial: bool = False, names: Sequence[str] = ()) -> Any:
        """Reads the arrays of a found step (5 and 6 of the restore order).

        Args:
            found: from `find`.
            target: a `TrainState` of `jax.ShapeDtypeStruct` with shardings, of any mesh; `partial`: less than was saved.
            names: the items that the averages are read from; by default those that such a state is saved in.

        Raises:
            UserError: if names, shapes or dtypes differ from the target, listing leaves.
        """
        read = _read_together if self._options.read_once else items.read_arrays
        names = names or NAMES[: len(target.emas)]
        emas = tuple(read(found.path / name, ema) for name, ema in zip(names, target.emas, strict=True))
        return target.replace(**read(found.path / "state", _state(target), partial=partial), emas=emas)

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
        try:
            arrays = {"state": _state(state)} | dict(zip(NAMES, state.emas, strict=False))
            self._writer.save(self._current, args=items.compose(arrays, record))
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
        failure = f"saving {self._current} failed ({reason(error)}); {last}"
        if isinstance(error, TimeoutError):
            failure += "; --save_seconds says how long it may take"
        if isinstance(cause(error), jax.errors.JaxRuntimeError):  # another process or a device is gone: no mending here
            return Interrupted(f"{failure}; run the same command again", code=Exit.CRASH)
        return UserError(f"{failure}; mend this, then run the same command again")

    def close(self) -> None:
        """Waits for the save under way and frees the threads; raises as `check`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()


def load(
    path: epath.PathLike, *, weights: str = "ema", ema: float | None = None, dtype: str | None = None, verify: bool = True
) -> tuple[Any, Params]:
    """A trained model and its weights; needs no config, mesh or optimizer.

    Args:
        path: a workdir (its newest undamaged step is used), a step directory, what `convert` wrote, or `hf://OWNER/NAME`.
        weights: "ema" (what samples are drawn from), "raw" (the last update), "initial" (step 0, by seed and `init_from`), or
            the item of another average, "ema_1", …
        ema: instead the decay of an average, one of the run's `optim.ema_decays`, such as 0.9996.
        dtype: what the model computes in, "float32" or "bfloat16"; as it was trained where it is not given.
        verify: check by the manifest's hashes what will be read, first.

    Returns:
        The model, and a nested dict of float32 arrays.

    Raises:
        UserError: if there is no checkpoint, it is damaged, it lacks the weights asked for, or there is no such `dtype`.
    """
    orbax_logging.quieten_orbax()
    if ema is not None:
        weights = averages.find(path, ema, verify=verify, report=distributed.say)
    one_of("weights", weights, ITEMS_UNREAD)
    path = directories.find(path, verify=verify, report=distributed.say, unread=ITEMS_UNREAD[weights])
    record = read_record(path)
    model = dip.from_config(dataclasses.replace(record.config.model, dtype=dtype or record.config.model.dtype))
    if weights == "initial":
        once = target.once_options(jax.default_backend())
        params = jax.jit(model.init, compiler_options=once)(jax.random.key(record.config.train.seed))
        if origin := read_origin(record.config.train):
            started, _ = starting.begin(params, origin, model=model.config, classes=record.classes)
            params = jax.tree.map(jnp.asarray, started)
        if asym.SUBSPACE in params:  # found in the dataset, not drawn from the seed
            params |= items.read_arrays(path / "ema", {asym.SUBSPACE: params[asym.SUBSPACE]}, partial=True)
        return model, params
    params = jax.eval_shape(model.init, jax.random.key(0))
    if weights in NAMES:
        return model, items.read_stored(path / weights, params, stored=record.stored)
    return model, items.read_arrays(path / "state", {"params": params}, partial=True)["params"]


def read_origin(train: Train) -> starting.Origin | None:
    """The model whose weights a run starts from (`train.init_from`, `train.init_weights`); None where it starts from its seed.

    Raises:
        UserError: as `load`.
    """
    if not train.init_from:
        return None
    unread = ITEMS_UNREAD[train.init_weights]
    path = directories.find(train.init_from, verify=True, report=distributed.say, unread=unread)
    model, params = load(path, weights=train.init_weights, verify=False)
    return starting.Origin(model.config, params, read_record(path).classes)


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
    with items.open_writer(lambda: manifest.write_manifest(path)) as writer:
        writer.save(path, args=items.compose({"ema": params}, Record(config, {})))
    return path


def _read_together(item: epath.Path, target: Any, *, partial: bool = False) -> Any:
    """As `items.read_arrays`; of hosts that hold the same array each reads a part, and has the others' over the network."""
    leaves, tree = jax.tree.flatten(target)
    parts = [sharding.split_over_hosts(leaf) for leaf in leaves]
    targets = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=part) for leaf, part in zip(leaves, parts, strict=True)]
    read = jax.tree.leaves(items.read_arrays(item, tree.unflatten(targets), partial=partial))
    split = [number for number, leaf in enumerate(leaves) if parts[number] is not leaf.sharding]
    if split:
        gather = jax.jit(lambda *arrays: arrays, out_shardings=tuple(leaves[number].sharding for number in split))
        for number, whole in zip(split, gather(*(read[number] for number in split)), strict=True):
            read[number] = whole
    return tree.unflatten(read)


def _state(state: Any) -> dict[str, Any]:
    """The item `state` of a `TrainState`: all but the averages."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
