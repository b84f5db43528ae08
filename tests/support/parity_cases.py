"""Networks with fixed random weights and inputs, shared by the parity tests and `benchmarks/parity_golden.py`.

Numbers come from `numpy.random.RandomState`, whose streams never change, so only the outputs of the PyTorch modules are
recorded; the answers of the authors' DiP came with their inputs.
"""

import dataclasses
import json
import zlib

import numpy as np
from places import GOLDEN

from dip_jax import config
from dip_jax.checkpoints import torch_names
from dip_jax.checkpoints.torch_tables import NETWORKS

ANSWERS = GOLDEN / "parity.npz"
OFFICIAL = GOLDEN / "official.npz"  # what the authors' DiP answers; its weights: `official_tensors`
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
    def model(self) -> config.Model:
        head = {"head": "coord_mlp", "head_width": 64, "head_depth": 2} if self.source == "pixnerd" else {"head": "none"}
        return config.Model(
            depth=2,
            width=self.width,
            num_heads={384: 6, 1152: 16}[self.width],
            patch_size=16,
            num_classes=NUM_CLASSES,
            image_size=(self.image_size,),
            dtype="float32",
            **head,
        )


CASES = [Case(source, width, size) for source in ("pixnerd", "ddt") for width in (384, 1152) for size in (256, 512)]


def random_tensors(case: Case) -> dict[str, np.ndarray]:
    """Non-zero weights for every tensor, of a size that keeps activations near one."""
    tensors = {}
    for name, shape in torch_names.shapes(case.model).items():
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


def official_cases() -> dict[str, dict]:
    """Sizes and seed of the networks of `OFFICIAL`, by name."""
    with np.load(OFFICIAL) as file:
        return json.loads(str(file["cases"]))


def official_model(name: str) -> config.Model:
    case = official_cases()[name]
    sizes = {"depth": case["layers"], "image_size": tuple(case["image_size"]), "dtype": "float32"}
    sizes |= {key: case[key] for key in ("width", "num_heads", "patch_size", "num_classes")}
    return config.Model(**sizes, **NETWORKS["dip"].fields)


def official_tensors(name: str) -> dict[str, np.ndarray]:
    """The weights of a case: a stream of numbers for each name, so another name gives other weights."""
    tensors, seed = {}, official_cases()[name]["seed"]
    for key, shape in torch_names.shapes(official_model(name)).items():
        noise = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())])).standard_normal(shape)
        if "norm" in key:
            value = 1 + 0.2 * noise
        else:
            value = noise / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * noise
        tensors[key] = value.astype(np.float32)
    return tensors


def official_answers(name: str) -> dict[str, np.ndarray]:
    """x and v [B, H, W, 3], t and y [B], and s [B, N, D], the features that the head reads."""
    with np.load(OFFICIAL) as file:
        arrays = {key: file[f"{name}/{key}"] for key in ("x", "t", "y", "v", "s")}
    return {key: array.transpose(0, 2, 3, 1) if array.ndim == 4 else array for key, array in arrays.items()}
