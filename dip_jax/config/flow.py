"""The objective's options."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, positive
from dip_jax.errors import UserError


@dataclass(frozen=True)
class Flow:
    """The objective (section 3.1): x_t = t x + (1 - t) eps, regress the velocity x - eps."""

    t_mean: float = 0.0  # t ~ sigmoid(N(t_mean, t_std))
    t_std: float = 1.0
    t_shift: float = 1.0  # then t / (t + (1 - t) t_shift); above 1 favours noise
    label_dropout: float = 0.1  # share of examples whose label becomes the null class
    internal_weight: float = 0.5  # of the loss of the second output, where there is one (`model.internal`)
    frequency_weight: float = 0.0  # of DeCo's loss of the velocity's 8x8 DCT (training/frequency.py); 0 is off, DeCo has 1

    def __post_init__(self):
        positive("flow", self, "t_std", "t_shift")
        not_negative("flow", self, "frequency_weight", "internal_weight")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"flow.label_dropout={self.label_dropout} must lie in [0, 1]")
