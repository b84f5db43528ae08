"""A velocity in closed form and the noise it starts from: shared by `benchmarks/official_sampling.py` and the tests.

`ANSWERS` holds, for each of `CASES`, the x that the authors' sampler had before each step and after the last, float32
[steps + 1, *SHAPE].
"""

from typing import Any

import numpy as np
from places import GOLDEN

ANSWERS = GOLDEN / "official_sampling.npz"
SHAPE = (3, 2, 2, 3)  # images as [B, H, W, C]
LABELS, NULL_LABEL = (0, 4, 8), 9
_GUIDED = {"steps": 8, "guidance": 2.9, "interval": (0.11, 0.97)}
CASES = {
    "euler": {"solver": "euler", **_GUIDED},
    "euler, ends of the interval on the grid": {"solver": "euler", **_GUIDED, "interval": (0.125, 0.75)},
    "euler, shifted": {"solver": "euler", **_GUIDED, "t_shift": 3.0},
    "rounded end, euler": {"solver": "euler", "steps": 10, "guidance": 2.9, "interval": (0.25, 0.75), "t_shift": 3.0},
    "heun": {"solver": "heun", **_GUIDED},
    "heun, no guidance": {"solver": "heun", **_GUIDED, "guidance": 1.0},
}


def noise() -> np.ndarray:
    return np.random.RandomState(0).standard_normal(SHAPE).astype(np.float32)


def velocity(lib: Any, x: Any, t: Any, y: Any) -> Any:
    """v of images, times [B] and float32 labels [B], by the functions of `lib` (numpy, jax.numpy or torch)."""
    t, y = (value[:, None, None, None] for value in (t, y))
    return lib.sin(x + y) * (1 + t) / 2 - 0.3 * x * lib.cos(3 * t)
