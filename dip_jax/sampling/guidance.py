"""Guidance on an interval, and when it applies: classifier-free, or by another model.

    v = v_u + w (v_c - v_u) where low < t < high, else v_c      (Ho & Salimans 2022)
    v = v_g + w (v_c - v_g) where low < t < high, else v_c      autoguidance (Karras et al. 2024)

v_g is the velocity of a weaker model for the same class: smaller, or trained for less time. As D = x + (1 - t) v, this is their
D_g + w (D_c - D_g). It takes the place of the unconditional half.

Internal guidance (Zhou et al. 2025) comes first, in each half: with v_i of an output after an early block, and v_f of the last,

    v = v_i + w' (v_f - v_i) where low' <= t <= high', else v_f

The interval (Kynkaanniemi et al. 2024) has strict ends. Outside it the unconditional half of the network does not run.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.typing import Ahead, Images, Labels, Predict, Times

_SOME = 2.0  # stands for every guidance scale but 1
_NEAR = 1e-6  # the same of float32 times
_SAME = 1e-12  # float64 times as near as this are one: the grid's own rounding stays under 1e-15


def is_guided(times: np.ndarray, sample: config.Sample) -> np.ndarray:
    """Whether the network runs both halves at each of the float64 times: inside the interval, unless w = 1.

    A time of the grid that is an end of the interval is outside, whichever way the two were rounded.
    """
    low, high = sample.interval
    return (times - low > _SAME) & (high - times > _SAME) & (sample.guidance != 1.0)


def without_scale(sample: config.Sample) -> config.Sample:
    """The same options but for how strong the guidance is: what a compiled trajectory depends on."""
    return sample if sample.guidance == 1 else dataclasses.replace(sample, guidance=_SOME)


def internal(final: Images, early: Images, t: Times, *, sample: config.Sample) -> Images:
    """Internal guidance of two velocities at times t [B]; both come from one evaluation of the network."""
    low, high = sample.internal_interval
    inside = (t >= low - _NEAR) & (t <= high + _NEAR)
    scale = jnp.where(inside, sample.internal_guidance, 1.0)[:, None, None, None]
    return early + scale * (final - early)


def check_internal(sample: config.Sample, model: config.Model) -> None:
    """Raises `UserError` where internal guidance is asked of a model without a second output."""
    if sample.internal_guidance != 1 and not model.internal:
        raise UserError(
            f"internal guidance {sample.internal_guidance} needs a model with a second output (model.internal): leave it "
            "at 1, or train that output by train --init_from --config.model.internal=True --config.train.only=internal"
        )


@dataclass(frozen=True)
class Guide:
    """The network and what it is told."""

    predict: Predict
    labels: Labels
    scale: float | jax.Array
    null_label: int
    ahead: Ahead | None
    weaker: Predict | None = None  # autoguidance: the velocity of the guiding model

    def prepare(self, times: np.ndarray, guided: bool) -> tuple[Any, Any]:
        """What `ahead` makes of S times, for the labels [S, B, ...] and, where guided, for no class [S, 1, ...]; None, None."""
        if self.ahead is None:
            return None, None
        times = jnp.asarray(times)
        own = self.ahead(times, self.labels)
        return own, self.ahead(times, self._nothing[:1]) if guided and self.weaker is None else None

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

        if self.weaker is not None:
            away = self.weaker(x, t, self.labels)
            return away + self.scale * (self.predict(x, t, self.labels, *self._given(own)) - away)

        def pair(unconditional, conditional):
            unconditional = jnp.broadcast_to(unconditional, conditional.shape)
            return jnp.stack([unconditional, conditional], axis=1).reshape(-1, *conditional.shape[1:])

        both = jax.tree.map(pair, none, own)
        v = self.predict(pair(x, x), pair(t, t), pair(self._nothing, self.labels), *self._given(both))
        unconditional, conditional = jnp.moveaxis(v.reshape(-1, 2, *x.shape[1:]), 1, 0)
        return unconditional + self.scale * (conditional - unconditional)

    def _given(self, prepared: Any) -> tuple[Any, ...]:
        return () if self.ahead is None else (prepared,)
