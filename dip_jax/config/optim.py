"""The optimizer's options."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive
from dip_jax.errors import UserError


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
    ema_decay: float = 0.9999  # ema <- decay * ema + (1 - decay) * params, every step from step 0
    ema_warmup: bool = False  # decay at step k (from 0) is min(ema_decay, (1 + k) / (10 + k)): for short runs

    def __post_init__(self):
        one_of("optim.schedule", self.schedule, ("constant", "cosine"))
        positive("optim", self, "learning_rate", "eps", "accumulate")
        not_negative("optim", self, "warmup_steps", "weight_decay")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.grad_clip is not None:
            positive("optim", self, "grad_clip")
