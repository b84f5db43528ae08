"""AdamW and its schedule as one optax chain; the decay of the weight average."""

import math

import jax
import jax.numpy as jnp
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
    adamw = optax.adamw(
        learning_rate(optim, total_steps=total_steps),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    chain = adamw if optim.grad_clip is None else optax.chain(optax.clip_by_global_norm(optim.grad_clip), adamw)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises float rates to integer counts
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def ema_decay(optim: Optim, step: Int[Array, ""]) -> Float[Array, ""]:
    """Decay of the weight average at the update that follows `step` updates (0 for the first).

    `optim.ema_decay`, or with `optim.ema_warmup` min(ema_decay, (1 + step) / (10 + step)), which forgets the initial weights
    in short runs.
    """
    if not optim.ema_warmup:
        return jnp.asarray(optim.ema_decay, jnp.float32)
    k = step.astype(jnp.float32)
    return jnp.minimum(optim.ema_decay, (1 + k) / (10 + k))
