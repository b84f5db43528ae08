"""A FID Inception network with random weights: same numbers in every process, none of them trained."""

import numpy as np

SEED = 2015


def tensors(shapes):
    """Weights by pytorch-fid's names for `shapes`, convolution -> [O, I, kh, kw], scaled to keep activations near 1."""
    rng = np.random.default_rng(SEED)
    out = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:])
        out[f"{name}.conv.weight"] = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
        out[f"{name}.bn.weight"] = rng.random(shape[0], np.float32) + np.float32(0.5)
        out[f"{name}.bn.bias"] = rng.standard_normal(shape[0], np.float32) * np.float32(0.1)
        out[f"{name}.bn.running_mean"] = rng.standard_normal(shape[0], np.float32) * np.float32(0.1)
        out[f"{name}.bn.running_var"] = rng.random(shape[0], np.float32) + np.float32(0.5)
    out["fc.weight"] = rng.standard_normal((1008, 2048), np.float32) * np.float32(0.02)
    out["fc.bias"] = rng.standard_normal(1008, np.float32)
    return out
