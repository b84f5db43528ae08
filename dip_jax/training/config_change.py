"""Which options may change between two starts in one workdir."""

from collections.abc import Collection

from dip_jax.config import Config, difference
from dip_jax.errors import UserError

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
}


def check(old: Config, new: Config, *, allowed: Collection[str]) -> None:
    """Refuses to go on with a config that would change what is learnt.

    Args:
        old: of the checkpoint.
        new: of this start.
        allowed: keys that may differ all the same. `train.steps` may where the learning rate does not depend on it.

    Raises:
        UserError: listing every other difference.
    """
    free = {*FREE, *allowed, *(["train.steps"] if new.optim.schedule == "constant" else [])}
    lines = [line for line in difference(old, new) if not {line.split(":")[0], line.split(".")[0]} & free]
    if new.repa.weight and not old.repa.weight:
        raise UserError(
            f"the workdir began without alignment (repa.weight: 0 -> {new.repa.weight}), which can be taken away from a run "
            "but not added to one: choose another --workdir"
        )
    if lines:
        keys = ",".join(line.split(":")[0] for line in lines)
        raise UserError(
            f"the workdir belongs to another config ({'; '.join(lines)}): choose another --workdir, "
            f"or go on with the change by --allow_change={keys}"
        )
