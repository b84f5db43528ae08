"""How samples are drawn."""

import math
from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive
from dip_jax.errors import UserError


@dataclass(frozen=True)
class Sample:
    """How images are drawn (section 4.1 and appendix C: Euler, 100 steps, classifier-free guidance on an interval).

    The paper's table gives the interval as (0.11, 0.97) and writes t = 1 for noise, its code t = 1 for data: mirrored it is
    (0.03, 0.89). Sweep both before comparing with a published number.
    """

    solver: str = "euler"  # euler | heun | ab2 | sde
    steps: int = 100
    guidance: float = 2.9  # v = v_u + guidance * (v_c - v_u)
    interval: tuple[float, float] = (0.11, 0.97)  # guidance applies where low < t < high, strictly
    internal_guidance: float = 1.0  # v = v_i + internal_guidance * (v_f - v_i), v_i of the second output (`model.internal`)
    internal_interval: tuple[float, float] = (0.0, 1.0)  # it applies where low <= t <= high
    t_shift: float = 1.0  # time grid t / (t + (1 - t) t_shift)
    sde_noise: float = 1.0  # sde: g^2 = 2 sde_noise (1 - t); 0 is the ODE
    batch_size: int = 64  # images per compiled call, over all devices

    def __post_init__(self):
        one_of("sample.solver", self.solver, ("euler", "heun", "ab2", "sde"))
        positive("sample", self, "t_shift", "batch_size")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"sample.steps={self.steps} must lie in 1..1000")
        not_negative("sample", self, "sde_noise")
        if not math.isfinite(self.guidance):
            raise UserError(f"sample.guidance={self.guidance} must be a finite number")
        if not math.isfinite(self.internal_guidance):
            raise UserError(f"sample.internal_guidance={self.internal_guidance} must be a finite number")
        for name in ("interval", "internal_interval"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
                raise UserError(f"sample.{name}={ends} must be low,high with 0 <= low <= high <= 1")
