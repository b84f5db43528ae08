"""How samples are judged."""

from dataclasses import dataclass

from dip_jax.config.checks import positive


@dataclass(frozen=True)
class Eval:
    """What a sample set is judged with."""

    reference: str = ""  # prepared dataset, folder of pictures, or an .npz of images or of ADM statistics
    # Row of metrics/features.py: lite0 | inception; anything but inception carries its name in the metric's name.
    features: str = "lite0"
    weights: str = ""  # file of the inception weights
    num_samples: int = 500
    batch_size: int = 50  # images per feature-network call

    def __post_init__(self):
        positive("eval", self, "num_samples", "batch_size")
