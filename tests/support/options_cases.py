"""Inputs of the objective's options, made again from seeds: shared by `benchmarks/options_golden.py` and the tests."""

import functools
import zlib

import numpy as np
from places import GOLDEN

ANSWERS = GOLDEN / "options.npz"
SCALE, GUIDANCE = 1.4, 2.0  # internal guidance and classifier-free guidance
CONTEXT, GRID, WIDTH, HEADS = 4, 17, 32, 2  # on 17 x 17 tokens their positions, 0..16, are ours
PATCHES, PATCH, RANK = 6, 4, 5


@functools.cache
def answers() -> dict[str, np.ndarray]:
    with np.load(ANSWERS) as file:
        return dict(file)


def normal(name: str, *shape: int) -> np.ndarray:
    """float32, a function of its name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def velocities() -> tuple[np.ndarray, np.ndarray]:
    """What was said, and the target, [2, 16, 24, 3]."""
    return normal("said", 2, 16, 24, 3), normal("target", 2, 16, 24, 3)


def internal() -> dict[str, np.ndarray]:
    """Noise x [2, 8, 8, 3] and the four velocities there: of the final and of the internal output, with a class and without."""
    return {name: normal(name, 2, 8, 8, 3) for name in ("x", "final", "early", "final_null", "early_null")}


def internal_batch() -> dict[str, np.ndarray]:
    """Images, noise, times, and what both outputs say of the velocity (ours)."""
    arrays = {name: normal(f"batch {name}", 3, 8, 8, 3) for name in ("image", "noise", "final", "early")}
    return arrays | {"t": np.array([0.2, 0.5, 0.9], np.float32)}


def attention() -> dict[str, np.ndarray]:
    """Tokens with their in-context ones first, and the weights of one attention layer, in PyTorch's shapes."""
    d = WIDTH
    shapes = {"x": (2, CONTEXT + GRID**2, d), "qkv": (3 * d, d), "proj": (d, d), "proj_bias": (d,)}
    shapes |= {"q_norm": (d // HEADS,), "k_norm": (d // HEADS,)}
    sizes = {name: np.float32(1 if name == "x" else np.sqrt(d)) for name in shapes}
    return {name: normal(f"attention {name}", *shape) / sizes[name] for name, shape in shapes.items()}


def context() -> dict[str, np.ndarray]:
    """A label's embedding and the learned table."""
    return {"label": normal("label", 2, WIDTH), "table": normal("table", CONTEXT, WIDTH)}


def asym() -> dict[str, np.ndarray]:
    """Patches of x_t and of the output [B, N, 3 P P], times (ours), an orthonormal basis."""
    size = 3 * PATCH**2
    basis = np.linalg.qr(normal("basis", size, RANK).astype(np.float64))[0].astype(np.float32)
    arrays = {name: normal(f"asym {name}", 2, PATCHES, size) for name in ("x_t", "said")}
    return arrays | {"basis": basis, "t": np.array([0.3, 0.8], np.float32)}
