"""The loop's options."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive
from dip_jax.errors import UserError


@dataclass(frozen=True)
class Train:
    """The loop: how long, how often it reports, when it gives up."""

    steps: int = 800_729  # 160 epochs of ImageNet at batch 256
    seed: int = 0
    init_from: str = ""  # checkpoint whose weights a new run starts from (section 3.4); set by --init_from
    init_weights: str = "ema"  # of that checkpoint: ema (the average) | raw (the last update's); set by --init_weights
    only: str = "all"  # what is trained: all | internal (the second output alone, on the model of --init_from)
    log_every: int = 100
    sample_every: int = 5000  # a grid drawn from the EMA; 0 is never
    eval_every: int = 0  # a small FID of the EMA and of the last weights; 0 is never
    profile_steps: tuple[int, int] = (0, 0)  # (1000, 1005) traces five steps after the first 1000; equal numbers trace none
    tracker: str = ""  # beside TensorBoard: wandb | mlflow
    bad_steps: int = 10  # non-finite updates in a row that are skipped before `on_bad_steps`
    on_bad_steps: str = "rollback"  # rollback (to the last good checkpoint, other data) | abort
    watchdog_seconds: float = 600.0  # no step for this long: print every thread's stack and abort; 0 is off

    def __post_init__(self):
        positive("train", self, "steps", "log_every", "bad_steps")
        not_negative("train", self, "seed", "sample_every", "eval_every", "watchdog_seconds")
        if len(self.profile_steps) != 2 or not 0 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise UserError(f"train.profile_steps={self.profile_steps} must be first,last with 0 <= first <= last")
        if self.tracker:
            one_of("train.tracker", self.tracker, ("wandb", "mlflow"))
        one_of("train.init_weights", self.init_weights, ("ema", "raw"))
        one_of("train.only", self.only, ("all", "internal"))
        one_of("train.on_bad_steps", self.on_bad_steps, ("rollback", "abort"))
