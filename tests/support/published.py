"""Small networks that PyTorch projects could have published, with random weights, and their files."""

import numpy as np
from parity_cases import NUM_CLASSES
from safetensors.numpy import save_file

from dip_jax import config
from dip_jax.checkpoints import torch_names
from dip_jax.checkpoints.torch_tables import NETWORKS

_SIZES = {"depth": 2, "width": 32, "num_heads": 2, "num_classes": NUM_CLASSES}
_SMALL = _SIZES | {"patch_size": 4, "image_size": (8,)}
MODELS = {
    "dip": config.Model(patch_size=16, image_size=(32, 48), **_SIZES, **NETWORKS["dip"].fields),
    "pixnerd": config.Model(head="coord_mlp", head_width=8, head_depth=2, **_SMALL),
    "ddt": config.Model(head="none", **_SMALL),
}


def tensors(source="pixnerd"):
    random = np.random.RandomState(0)
    shapes = torch_names.shapes(MODELS[source])
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, values):
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)
    return path
