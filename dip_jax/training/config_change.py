"""Which options may change between two starts in one workdir."""

from collections.abc import Collection

import jax

from dip_jax.checkpoints import averages
from dip_jax.config import Config, difference
from dip_jax.errors import UserError
from dip_jax.models import dip

# Whole sections or single keys; nothing here decides what is learnt.
FREE = {
    "mesh",
    "checkpoint",
    "sample",
    "eval",
    "data.path",
    "data.source",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch",
    "repa.encoder",  # the file may lie elsewhere; that it is the same one, the checkpoint knows
    "model.attention",
    "model.remat",
    "model.head_remat",
    "train.log_every",
    "train.sample_every",
    "train.eval_every",
    "train.bad_steps",
    "train.on_bad_steps",
    "train.watchdog_seconds",
    "train.profile_steps",
    "train.tracker",
}
FIXED = {"train.seed", "model.image_size"}


def check(old: Config, new: Config, *, allowed: Collection[str]) -> None:
    """Refuses to go on with a config that would change what is learnt.

    Args:
        old: of the checkpoint.
        new: of this start.
        allowed: keys that may differ all the same. `train.steps` may where the learning rate does not depend on it.

    Raises:
        UserError: listing every other difference, or those that cannot be allowed.
    """
    free = {*FREE, *allowed, *(["train.steps"] if new.optim.schedule == "constant" else [])}
    lines = [line for line in difference(old, new) if not {line.split(":")[0], line.split(".")[0]} & free]
    if new.repa.weight and not old.repa.weight:
        raise UserError(
            f"the workdir began without alignment (repa.weight: 0 -> {new.repa.weight}), which can be taken away from a run "
            "but not added to one: choose another --workdir"
        )
    before, after = old.optim.ema_decays, new.optim.ema_decays
    if averages.carried_over(before, after) is None:
        raise UserError(
            f"the workdir began with averages of decay {before}, not {after}: one can be taken away from a run, "
            "but none can begin in its middle: choose another --workdir"
        )
    if lines:
        keys = ",".join(line.split(":")[0] for line in lines)
        way_out = "" if _find_fixed(old, new) else f", or go on with the change by --allow_change={keys}"
        raise UserError(f"the workdir belongs to another config ({'; '.join(lines)}): choose another --workdir{way_out}")
    if fixed := _find_fixed(old, new):
        raise UserError(
            f"--allow_change does not help with {'; '.join(fixed)}: the weights or the data of the checkpoint would not fit; "
            "choose another --workdir"
        )


def _find_fixed(old: Config, new: Config) -> list[str]:
    """The differences with which no run can go on: the seed of the data's order, the images' size, the weights' shapes."""
    lines = difference(old, new)
    trained = {"repa.projector"} if old.repa.weight and new.repa.weight else set()  # its weights are in the checkpoint
    fixed = [line for line in lines if line.split(":")[0] in FIXED | trained]
    model = [line for line in lines if line.startswith("model.") and line not in fixed and line.split(":")[0] not in FREE]
    if model and not fixed:
        before, now = (jax.eval_shape(dip.from_config(each.model).init, jax.random.key(0)) for each in (old, new))
        same = jax.tree.structure(before) == jax.tree.structure(now) and jax.tree.leaves(before) == jax.tree.leaves(now)
        fixed = [] if same else model
    return fixed
