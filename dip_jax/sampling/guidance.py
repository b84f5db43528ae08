"""Classifier-free guidance on an interval, and when it applies.

    v = v_u + w (v_c - v_u) where low < t < high, else v_c      (Ho & Salimans 2022)

The interval (Kynkaanniemi et al. 2024) has strict ends. Outside it the unconditional half of the network does not run.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dip_jax import config
from dip_jax.typing import Ahead, Labels, Predict

_SAME = 1e-12  # float64 times as near as this are one: the grid's own rounding stays under 1e-15


def is_guided(times: np.ndarray, sample: config.Sample) -> np.ndarray:
    """Whether the network runs both halves at each of the float64 times: inside the interval, unless w = 1.

    A time of the grid that is an end of the interval is outside, whichever way the two were rounded.
    """
    low, high = sample.interval
    return (times - low > _SAME) & (high - times > _SAME) & (sample.guidance != 1.0)


@dataclass(frozen=True)
class Guide:
    """The network and what it is told."""

    predict: Predict
    labels: Labels
    scale: float
    null_label: int
    ahead: Ahead | None

    def prepare(self, times: np.ndarray, guided: bool) -> tuple[Any, Any]:
        """What `ahead` makes of S times, for the labels [S, B, ...] and, where guided, for no class [S, 1, ...]; None, None."""
        if self.ahead is None:
            return None, None
        times = jnp.asarray(times)
        return self.ahead(times, self.labels), self.ahead(times, self._nothing[:1]) if guided else None

    @property
    def _nothing(self) -> Labels:
        return jnp.full_like(self.labels, self.null_label)

    def velocity(self, x: jax.Array, t: jax.Array, prepared: tuple[Any, Any], *, guided: bool) -> jax.Array:
        """v at x [B, ...] and t [B].

        The two halves are one batch, each sample's pair side by side, so that a sharded batch stays where it is.
        """
        own, none = prepared
        if not guided:
            return self.predict(x, t, self.labels, *self._given(own))

        def pair(unconditional, conditional):
            unconditional = jnp.broadcast_to(unconditional, conditional.shape)
            return jnp.stack([unconditional, conditional], axis=1).reshape(-1, *conditional.shape[1:])

        both = jax.tree.map(pair, none, own)
        v = self.predict(pair(x, x), pair(t, t), pair(self._nothing, self.labels), *self._given(both))
        unconditional, conditional = jnp.moveaxis(v.reshape(-1, 2, *x.shape[1:]), 1, 0)
        return unconditional + self.scale * (conditional - unconditional)

    def _given(self, prepared: Any) -> tuple[Any, ...]:
        return () if self.ahead is None else (prepared,)
