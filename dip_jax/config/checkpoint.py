"""What is kept of a run."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive


@dataclass(frozen=True)
class Checkpoint:
    """When to save, what to keep."""

    every_steps: int = 5000
    keep_last: int = 3
    keep_every: int = 0  # steps divisible by this stay for ever; 0 keeps none
    keep_best: str = ""  # fid | sfid | is | precision | recall: the step best by this metric of eval.jsonl stays too
    verify: bool = True  # check the manifest's hashes before a restore
    read_once: bool = True  # of hosts that hold the same, each reads a part and sends it to the others; False: each reads all

    def __post_init__(self):
        positive("checkpoint", self, "every_steps", "keep_last")
        not_negative("checkpoint", self, "keep_every")
        if self.keep_best:
            one_of("checkpoint.keep_best", self.keep_best, ("fid", "sfid", "is", "precision", "recall"))
