"""The optimizer's options."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive
from dip_jax.errors import UserError

MOST_AVERAGES = 8  # of the weights, in one run


@dataclass(frozen=True)
class Optim:
    """AdamW and the exponential moving average of the weights (section 4.1)."""

    learning_rate: float = 1e-4
    schedule: str = "constant"  # after the warm-up: constant | cosine (to zero at train.steps)
    warmup_steps: int = 0  # linear from zero
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None  # global norm; None is off
    accumulate: int = 1  # micro-batches per step; the batch is split, the result is the same
    # For each decay an average of its own, ema <- decay * ema + (1 - decay) * params, every step from step 0. The first one is
    # what samples are drawn from where nothing else is said; the others cost their memory and are for `sweep`.
    ema_decays: tuple[float, ...] = (0.9999,)
    ema_warmup: bool = False  # decay at step k (from 0) is min(decay, (1 + k) / (10 + k)): for short runs

    def __post_init__(self):
        one_of("optim.schedule", self.schedule, ("constant", "cosine"))
        positive("optim", self, "learning_rate", "eps", "accumulate")
        not_negative("optim", self, "warmup_steps", "weight_decay")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        for decay in self.ema_decays:
            if not 0 <= decay < 1:
                raise UserError(f"optim.ema_decays={self.ema_decays}: {decay} must lie in [0, 1)")
        if not 1 <= len(set(self.ema_decays)) == len(self.ema_decays) <= MOST_AVERAGES:
            raise UserError(
                f"optim.ema_decays={self.ema_decays} must be 1 to {MOST_AVERAGES} different decays, such as (0.9999, 0.9996)"
            )
        if self.grad_clip is not None:
            positive("optim", self, "grad_clip")
