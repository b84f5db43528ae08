"""Twenty steps of the authors' training, made again from seeds: shared by `benchmarks/official_training.py` and the tests.

Everything that goes in comes from `numpy.random.RandomState`, whose streams never change; `ANSWERS` holds what came out:

    settings                     JSON: every number of `SETTINGS`
    shapes                       JSON: {part: {name: shape}} of denoiser, proj and encoder, the official names in their order
    loss, loss_flow, loss_repa   float64 [steps]: loss, fm_loss and cos_loss of their trainer, before each update
    t, y                         [steps, B]: times and labels that the network was given, labels being dropped already
    x_t                          float32 [B, H, W, 3]: the noisy images of the first step
    digest/start, digest/params  float64 [T, 1 + DIRECTIONS]: see `digest`; the weights before and after the steps, T counting
                                 the tensors of denoiser and then proj
    digest/ema, digest/ema_fast  the same of the averages with decay `ema` and `ema_fast`, T counting those of the denoiser
    params/NAME, ema/NAME        float32: the tensors of `WHOLE` as they are
"""

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
from places import GOLDEN

ANSWERS = GOLDEN / "official_training.npz"
DIRECTIONS = 4
WHOLE = (
    "blocks.8.adaLN_modulation.0.bias",
    "blocks.9.attn.k_norm.weight",
    "local_decoder.bottleneck.0.bias",
    "local_decoder.out_conv.weight",
    "y_embedder.embedding_table.weight",
)
SETTINGS = {
    "width": 64,
    "depth": 10,  # two blocks beyond the one whose tokens are aligned
    "num_heads": 2,
    "patch_size": 16,
    "image_size": 64,
    "num_classes": 10,
    "encoder_width": 128,
    "encoder_depth": 2,
    "encoder_table": 37,
    "layer": 8,
    "weight": 0.5,
    "label_dropout": 0.1,
    "batch_size": 2,
    "steps": 20,
    "learning_rate": 1e-4,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.5,  # so large that which tensors it applies to shows: 1e-3 of them after the steps
    "ema": 0.9999,
    "ema_fast": 0.9,
}

Shapes = Mapping[str, Iterable[int]]


def random_tensors(part: str, shapes: Shapes) -> dict[str, np.ndarray]:
    """Non-zero float32 weights of the `part` (denoiser, proj or encoder), of a size that keeps activations near one."""
    tensors = {}
    for name, shape in shapes.items():
        value = _random(f"{part}.{name}").standard_normal(tuple(shape))
        if ("norm" in name and name.endswith("weight")) or "gamma" in name:
            value = 1 + 0.2 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        elif name.endswith("weight"):
            value = value / np.sqrt(np.prod(value.shape[1:]))
        tensors[name] = value.astype(np.float32)
    return tensors


def inputs(step: int) -> dict[str, np.ndarray]:
    """What one step is fed and what it draws.

    Returns:
        image uint8 [B, H, W, 3]; label int64 [B]; normal float32 [B], whose sigmoid is t; noise float32 [B, H, W, 3]; and
        uniform float32 [B]: labels are dropped where it is below `label_dropout`.
    """
    batch, side, random = SETTINGS["batch_size"], SETTINGS["image_size"], _random(f"step {step}")
    image = random.randint(0, 256, (batch, side, side, 3)).astype(np.uint8)
    image[:, :, : side // 2] //= 4  # one half darker and smoother than the other
    return {
        "image": image,
        "label": random.randint(0, SETTINGS["num_classes"], batch),
        "normal": random.standard_normal(batch).astype(np.float32),
        "noise": random.standard_normal(image.shape).astype(np.float32),
        "uniform": random.uniform(size=batch).astype(np.float32),
    }


def digest(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each tensor its norm, and its inner products with directions of standard normal numbers, float64 [T, 1 + DIRECTIONS].

    The mean square of the differences between two tensors' inner products is about the square of the norm of their difference.
    """
    rows = []
    for name, tensor in tensors.items():
        flat = np.asarray(tensor, np.float64).ravel()
        rows.append([np.linalg.norm(flat), *(_random(f"directions of {name}").standard_normal((DIRECTIONS, flat.size)) @ flat)])
    return np.array(rows)


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))
