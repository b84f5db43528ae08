"""DINOv2s with fixed random weights and images, shared by the parity test and `benchmarks/parity_dinov2.py`.

Numbers come from `numpy.random.RandomState`, whose streams never change, so only the published code's outputs are recorded.
"""

import dataclasses
import zlib

import numpy as np
from places import GOLDEN

from dip_jax.models.dinov2 import DinoV2, tensor_shapes

ANSWERS = GOLDEN / "dinov2.npz"
BASE = DinoV2(width=768, depth=12)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    encoder: DinoV2
    image: tuple[int, int]
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch_size, self.image[1] // self.patch_size


TINY = DinoV2(width=128, depth=2)
CASES = [
    Case("tiny-256", TINY, (256, 256), 16),
    Case("tiny-512", TINY, (512, 512), 16),
    Case("tiny-512-patch32", TINY, (512, 512), 32),
    Case("tiny-oblong", TINY, (96, 160), 16),
    Case("tiny-own-grid", dataclasses.replace(TINY, table_side=4), (64, 64), 16),
    Case("base-256", BASE, (256, 256), 16),
    Case("base-512-patch32", BASE, (512, 512), 32),
]


def random_tensors(encoder: DinoV2) -> dict[str, np.ndarray]:
    """Non-zero weights for every tensor, of a size that keeps activations near one."""
    tensors = {}
    for name, shape in tensor_shapes(encoder).items():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if ("norm" in name and name.endswith("weight")) or "gamma" in name:
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise / np.sqrt(np.prod(shape[1:])) if name.endswith("weight") else noise
        tensors[name] = value.astype(np.float32)
    return tensors


def images(case: Case) -> np.ndarray:
    """Two images of random pixels in [-1, 1], smooth in one half: [2, H, W, 3]."""
    pixels = np.random.RandomState(case.image[0]).randint(0, 256, (2, *case.image, 3))
    pixels[:, ::2, : case.image[1] // 2] = pixels[:, 1::2, : case.image[1] // 2]
    return (pixels / 127.5 - 1).astype(np.float32)


def thin(tokens: np.ndarray) -> np.ndarray:
    """About two thousand values, at every channel sooner or later: the stride is prime."""
    flat = np.asarray(tokens, np.float32).ravel()
    return flat[:: 211 if flat.size > 200_000 else 23]
