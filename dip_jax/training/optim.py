"""AdamW and its schedule as one optax chain; the decays of the averages of the weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dip_jax.config import Optim


def learning_rate(optim: Optim, *, total_steps: int) -> optax.Schedule:
    """Learning rate at each step: linear warm-up from zero, then constant or a cosine to zero at `total_steps`."""
    if optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(optim.learning_rate, max(total_steps - optim.warmup_steps, 1))
    else:
        after = optax.constant_schedule(optim.learning_rate)
    if not optim.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps)
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


def learning_rate_after(updates: int, optim: Optim, *, total_steps: int) -> float:
    """`learning_rate` on the host: of the update that follows so many, without asking a device that is at work."""
    if updates < optim.warmup_steps:
        return optim.learning_rate * updates / optim.warmup_steps
    if optim.schedule != "cosine":
        return optim.learning_rate
    done = (updates - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    return optim.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def make_optimizer(optim: Optim, *, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping where `optim.grad_clip` asks for it, then AdamW; moments in float32."""
    adamw = optax.chain(  # as optax.adamw, whose states these are
        _scale_by_adam(optim),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(learning_rate(optim, total_steps=total_steps)),
    )
    chain = adamw if optim.grad_clip is None else optax.chain(optax.clip_by_global_norm(optim.grad_clip), adamw)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises float rates to integer counts
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def renest(state: Any, *, old: Optim, new: Optim) -> Any:
    """An optimizer state (or a tree in its shape) of `old` as `new` nests it: clipping has a place of its own in the chain."""
    if (old.grad_clip is None) == (new.grad_clip is None):
        return state
    return state[1] if new.grad_clip is None else (optax.EmptyState(), state)


def _scale_by_adam(optim: Optim) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with optax's state and moments, and the bias correction of `_weight`."""

    def update(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, optim.b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, optim.b2, 2)
        count = optax.safe_increment(state.count)
        first, second = _weight(optim.b1, count), _weight(optim.b2, count)
        updates = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + optim.eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _weight(b: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """The sum of the weights in a moving average that began at zero, 1 - b^count on paper.

    In float32 b and 1 - b do not add up to 1, and 1 - b^count cancels: with b = 0.999 the second moment would be off by 1.3e-5
    of itself. This is f (1 - d^count) / (1 - d), with the two factors d and f that float32 has for b and 1 - b.
    """
    d, f = float(np.float32(b)), float(np.float32(1 - b))
    if not d:
        return jnp.ones((), jnp.float32)
    return jnp.expm1(count.astype(jnp.float32) * math.log(d)) * (f / (d - 1))


def ema_decays(optim: Optim, step: Int[Array, ""]) -> tuple[Float[Array, ""], ...]:
    """Decay of each average of the weights at the update that follows `step` updates (0 for the first).

    `optim.ema_decays`, or with `optim.ema_warmup` at most (1 + step) / (10 + step), which forgets the initial weights in short
    runs.
    """
    if not optim.ema_warmup:
        return tuple(jnp.asarray(decay, jnp.float32) for decay in optim.ema_decays)
    k = step.astype(jnp.float32)
    return tuple(jnp.minimum(decay, (1 + k) / (10 + k)) for decay in optim.ema_decays)
