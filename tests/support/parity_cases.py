"""Networks with fixed random weights and inputs, shared by the parity tests and `benchmarks/parity_golden.py`.

Numbers come from `numpy.random.RandomState`, whose streams never change, so only the outputs of the PyTorch modules are
recorded.
"""

import dataclasses
import zlib

import numpy as np
from places import GOLDEN

from dip_jax.jobs.convert import Sizes, tensor_shapes

ANSWERS = GOLDEN / "parity.npz"
NUM_CLASSES = 7


@dataclasses.dataclass(frozen=True)
class Case:
    source: str
    width: int
    image_size: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.width}-{self.image_size}"

    @property
    def sizes(self) -> Sizes:
        decoder = 2 if self.source == "pixnerd" else 0
        return Sizes(
            depth=2,
            width=self.width,
            num_heads={384: 6, 1152: 16}[self.width],
            patch_size=16,
            num_classes=NUM_CLASSES,
            head_depth=decoder,
        )


CASES = [Case(source, width, size) for source in ("pixnerd", "ddt") for width in (384, 1152) for size in (256, 512)]


def random_tensors(case: Case) -> dict[str, np.ndarray]:
    """Non-zero weights for every tensor, of a size that keeps activations near one."""
    tensors = {}
    for name, shape in tensor_shapes(case.source, case.sizes).items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        noise = random.standard_normal(shape)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise / np.sqrt(shape[-1]) if "embedding_table" not in name else 0.5 * noise
        tensors[name] = value.astype(np.float32)
    return tensors


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [2, H, W, 3], times [2] and labels [2], the second of them the null class."""
    random = np.random.RandomState(case.image_size)
    images = random.standard_normal((2, case.image_size, case.image_size, 3)).astype(np.float32)
    return images, np.array([0.3, 0.85], np.float32), np.array([3, NUM_CLASSES], np.int32)


def thin(images: np.ndarray) -> np.ndarray:
    """About a thousand values, at every position inside a patch sooner or later: the stride is prime."""
    return np.asarray(images, np.float32).ravel()[:: 389 if images.size < 600_000 else 1549]
