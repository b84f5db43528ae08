"""Files as PyTorch projects publish them, with random weights."""

import numpy as np
from parity_cases import NUM_CLASSES
from safetensors.numpy import save_file

from dip_jax.jobs import convert
from dip_jax.jobs.convert import Sizes

SIZES = Sizes(depth=2, width=32, num_heads=2, patch_size=4, num_classes=NUM_CLASSES, head_width=8, head_depth=2)


def tensors(source="pixnerd"):
    random = np.random.RandomState(0)
    shapes = convert.tensor_shapes(source, SIZES)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, values):
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)
    return path
