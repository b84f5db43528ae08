"""Watching the numbers of a run: skipped updates in a row, sudden jumps of the gradient, and when to give up.

The step itself leaves the state as it was where loss or gradient is not finite (`step.train_step`); this decides what follows.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Bool

from dip_jax.config import Train
from dip_jax.runtime import storage

_SPIKE = 10.0  # a gradient norm this many times the median of the last _WINDOW is reported
_WINDOW = 100
_ROLLBACKS = 3  # to one and the same step before giving up


class Watch:
    """What the metrics of one step after the other say.

    Attributes:
        skipped: updates not applied so far, over the whole run.
        streak: of these, how many just now in a row.
    """

    def __init__(self, train: Train):
        self.skipped = 0
        self._limit, self._may_roll_back = train.bad_steps, train.on_bad_steps == "rollback"
        self.streak = 0
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._origin, self._rollbacks = -1, 0

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Takes in one step's metrics; says what is wrong with them, or None."""
        if metrics["skipped"] > 0:
            self.skipped += 1
            self.streak += 1
            return "a number is not finite: update skipped"
        self.streak = 0
        norm = metrics["grad_norm"]
        usual = statistics.median(self._norms) if len(self._norms) == _WINDOW else math.inf
        self._norms.append(norm)
        return f"gradient norm {norm:.3g} is far above the usual {usual:.3g}" if norm > _SPIKE * usual else None

    @property
    def exhausted(self) -> bool:
        """True after `train.bad_steps` skipped updates in a row."""
        return self.streak >= self._limit

    def roll_back(self, origin: int, *, skipped: int) -> bool:
        """Whether to go on from step `origin` with other data (its record has `skipped`); False means give up."""
        self._rollbacks = self._rollbacks + 1 if origin == self._origin else 1
        self._origin, self.streak, self.skipped = origin, 0, skipped
        self._norms.clear()
        return self._may_roll_back and self._rollbacks <= _ROLLBACKS


def keep_for_inspection(
    workdir: epath.Path, step: int, *, reason: str, metrics: Mapping[str, float], order: Mapping[str, Any], records: list[int]
) -> epath.Path:
    """Writes `inspect/step_N.json`: the metrics of a suspect step and which records its batch held; returns the path."""
    folder = workdir / "inspect"
    folder.mkdir(exist_ok=True)
    numbers = {key: value if math.isfinite(value) else str(value) for key, value in metrics.items()}
    path = folder / f"step_{step:08d}.json"
    content = {"step": step, "reason": reason, "metrics": numbers, "order": dict(order), "records": records}
    storage.write_text(path, json.dumps(content))
    return path


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
