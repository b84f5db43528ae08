"""The Inception-v3 graph of December 2015, in which every published FID is measured (Szegedy et al. 2016; Heusel et al. 2017).

Not the Inception-v3 of model zoos: the average pools leave the padding out of the mean, the last block pools by maximum, there
are 1008 classes, and images are resized inside the graph by TensorFlow 1's bilinear rule, whose pixel centres lie at whole
numbers and which does not smooth when it shrinks. Weights come from the user's file; batch norms are folded into the
convolutions when loading.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dip_jax.checkpoints.torch_file import read_tensors
from dip_jax.errors import UserError
from dip_jax.runtime.storage import file_digest
from dip_jax.typing import Params, RawImages

SIZE = 299
DIMENSIONS = {"pool": 2048, "spatial": 17 * 17 * 7}
RESIZE = "TF1 bilinear (no half-pixel centres, no antialiasing)"
_CLASSES = 1008
_SPATIAL = 7  # channels of mixed_6/conv that sFID uses (Nash et al. 2021, as in the ADM evaluator)
_BN_EPS = 1e-3
_WHERE = (
    "give --weights=FILE: classify_image_graph_def.pb out of TensorFlow's inception-2015-12-05.tgz, as the ADM evaluator uses, "
    "or pytorch-fid's pt_inception-2015-12-05-6726825d.pth (the end of its name begins its SHA-256)"
)

# Convolutions by PyTorch's names and by the graph's scopes.
_STEM = "Conv2d_1a_3x3:conv Conv2d_2a_3x3:conv_1 Conv2d_2b_3x3:conv_2 Conv2d_3b_1x1:conv_3 Conv2d_4a_3x3:conv_4"
_A = (
    "branch1x1:conv branch5x5_1:tower/conv branch5x5_2:tower/conv_1 branch3x3dbl_1:tower_1/conv branch3x3dbl_2:tower_1/conv_1 "
    "branch3x3dbl_3:tower_1/conv_2 branch_pool:tower_2/conv"
)
_B = "branch3x3:conv branch3x3dbl_1:tower/conv branch3x3dbl_2:tower/conv_1 branch3x3dbl_3:tower/conv_2"
_C = (
    "branch1x1:conv branch7x7_1:tower/conv branch7x7_2:tower/conv_1 branch7x7_3:tower/conv_2 branch7x7dbl_1:tower_1/conv "
    "branch7x7dbl_2:tower_1/conv_1 branch7x7dbl_3:tower_1/conv_2 branch7x7dbl_4:tower_1/conv_3 branch7x7dbl_5:tower_1/conv_4 "
    "branch_pool:tower_2/conv"
)
_D = (
    "branch3x3_1:tower/conv branch3x3_2:tower/conv_1 branch7x7x3_1:tower_1/conv branch7x7x3_2:tower_1/conv_1 "
    "branch7x7x3_3:tower_1/conv_2 branch7x7x3_4:tower_1/conv_3"
)
_E = (
    "branch1x1:conv branch3x3_1:tower/conv branch3x3_2a:tower/mixed/conv branch3x3_2b:tower/mixed/conv_1 "
    "branch3x3dbl_1:tower_1/conv branch3x3dbl_2:tower_1/conv_1 branch3x3dbl_3a:tower_1/mixed/conv "
    "branch3x3dbl_3b:tower_1/mixed/conv_1 branch_pool:tower_2/conv"
)
_BLOCKS = {"5b": _A, "5c": _A, "5d": _A, "6a": _B, "6b": _C, "6c": _C, "6d": _C, "6e": _C, "7a": _D, "7b": _E, "7c": _E}


def _convolutions() -> dict[str, str]:
    """PyTorch name -> graph scope of all 94 convolutions."""
    pairs = dict(pair.split(":") for pair in _STEM.split())
    for i, (block, branches) in enumerate(_BLOCKS.items()):
        scope = f"mixed_{i}" if i else "mixed"
        pairs |= {f"Mixed_{block}.{name}": f"{scope}/{tail}" for name, tail in (pair.split(":") for pair in branches.split())}
    return pairs


def load(path: str | os.PathLike) -> Params:
    """Parameters from `classify_image_graph_def.pb`, or from a torch or safetensors file with pytorch-fid's names.

    Raises:
        UserError: no file is named, or it is missing, damaged, or of another network.
    """
    if not path:
        raise UserError(f"features=inception needs weights: {_WHERE}")
    if not epath.Path(path).is_file():
        raise UserError(f"{path}: no such file; {_WHERE}")
    tensors = _read_graph(path) if os.fspath(path).endswith(".pb") else read_tensors(path)
    try:
        params = {name: _folded(tensors, name) for name in _convolutions()}
        params["fc"] = jnp.asarray(tensors["fc.weight"].T, jnp.float32)
        shapes = jax.eval_shape(features, params, jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8))
        if shapes["logits"].shape != (1, _CLASSES) or shapes["pool"].shape != (1, DIMENSIONS["pool"]):
            raise ValueError(f"{shapes['logits'].shape[1]} classes")
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing: not the FID Inception network; {_WHERE}") from None
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path}: its tensors do not fit the FID Inception network ({reason}); {_WHERE}") from None
    return params


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of the weights file, hexadecimal."""
    return file_digest(path)


def _folded(tensors: dict[str, np.ndarray], name: str) -> dict[str, jax.Array]:
    parts = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    gamma, beta, mean, variance = (tensors[f"{name}.{part}"].astype(np.float64) for part in parts)
    scale = gamma / np.sqrt(variance + _BN_EPS)
    kernel = tensors[f"{name}.conv.weight"].astype(np.float64) * scale[:, None, None, None]  # O I H W
    return {
        "kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0), jnp.float32),
        "bias": jnp.asarray(beta - mean * scale, jnp.float32),
    }


def _read_graph(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The constants of a frozen TensorFlow graph, under PyTorch's names and layouts."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    try:
        graph.ParseFromString(epath.Path(path).read_bytes())
        constants = {node.name: _constant(node.attr["value"].tensor) for node in graph.node if node.op == "Const"}
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path}: truncated, damaged, or no TensorFlow graph ({error}); {_WHERE}") from None
    norms = {"bn.weight": "gamma", "bn.bias": "beta", "bn.running_mean": "moving_mean", "bn.running_var": "moving_variance"}
    tensors = {}
    for name, scope in _convolutions().items():
        sources = {f"{name}.{part}": f"{scope}/batchnorm/{tail}" for part, tail in norms.items()}
        tensors |= {target: constants[source] for target, source in sources.items() if source in constants}
        if f"{scope}/conv2d_params" in constants:
            tensors[f"{name}.conv.weight"] = constants[f"{scope}/conv2d_params"].transpose(3, 2, 0, 1)
    if "softmax/weights" in constants:
        tensors["fc.weight"] = constants["softmax/weights"].T
    return tensors


def _constant(tensor) -> np.ndarray:
    """A float32 TensorProto; other types, of which the graph's sizes and axes are, come back empty."""
    if tensor.dtype != 1:
        return np.zeros(0, np.float32)
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, "<f4").reshape(shape)
    return np.broadcast_to(np.array(tensor.float_val, np.float32), shape)


@jax.jit
def features(params: Params, images: RawImages) -> dict[str, jax.Array]:
    """Activations of uint8 images [B, H, W, 3] of any size.

    Args:
        params: from `load`.
        images: pixels 0..255; resized to 299 x 299 inside, then (v - 128) / 128.

    Returns:
        float32 "pool" [B, 2048] (pool_3), "spatial" [B, 2023] (the first 7 channels of mixed_6/conv, row by row, channels
        last) and "logits" [B, 1008] without their bias, as the ADM evaluator's Inception Score takes them.
    """
    x = _resize(images.astype(jnp.float32))
    x = (x - 128.0) / 128.0
    x = _conv(params["Conv2d_1a_3x3"], x, stride=2, padding="VALID")
    x = _conv(params["Conv2d_2a_3x3"], x, padding="VALID")
    x = _max_pool(_conv(params["Conv2d_2b_3x3"], x), stride=2)
    x = _conv(params["Conv2d_3b_1x1"], x)
    x = _max_pool(_conv(params["Conv2d_4a_3x3"], x, padding="VALID"), stride=2)
    spatial = None
    for block in _BLOCKS:
        p = {name.split(".")[1]: conv for name, conv in params.items() if name.startswith(f"Mixed_{block}.")}
        if block == "6d":
            spatial = _conv(p["branch1x1"], x)[..., :_SPATIAL].reshape(len(x), -1)
        x = _KINDS[_BLOCKS[block]](p, x, _max_pool if block == "7c" else _mean_pool)
    pool = x.mean(axis=(1, 2))
    return {"pool": pool, "spatial": spatial, "logits": pool @ params["fc"]}


def _a(p: Params, x: jax.Array, pool) -> jax.Array:
    branches = (_chain(p, x, "branch1x1"), _chain(p, x, "branch5x5_1", "branch5x5_2"))
    double = _chain(p, x, *(f"branch3x3dbl_{i}" for i in (1, 2, 3)))
    return jnp.concatenate([*branches, double, _chain(p, pool(x), "branch_pool")], axis=-1)


def _b(p: Params, x: jax.Array, pool) -> jax.Array:
    double = _halve(p["branch3x3dbl_3"], _chain(p, x, "branch3x3dbl_1", "branch3x3dbl_2"))
    return jnp.concatenate([_halve(p["branch3x3"], x), double, _max_pool(x, stride=2)], axis=-1)


def _c(p: Params, x: jax.Array, pool) -> jax.Array:
    single = _chain(p, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
    double = _chain(p, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
    return jnp.concatenate([_chain(p, x, "branch1x1"), single, double, _chain(p, pool(x), "branch_pool")], axis=-1)


def _d(p: Params, x: jax.Array, pool) -> jax.Array:
    short = _halve(p["branch3x3_2"], _chain(p, x, "branch3x3_1"))
    long = _halve(p["branch7x7x3_4"], _chain(p, x, *(f"branch7x7x3_{i}" for i in (1, 2, 3))))
    return jnp.concatenate([short, long, _max_pool(x, stride=2)], axis=-1)


def _e(p: Params, x: jax.Array, pool) -> jax.Array:
    single, double = _chain(p, x, "branch3x3_1"), _chain(p, x, "branch3x3dbl_1", "branch3x3dbl_2")
    forks = [_chain(p, single, f"branch3x3_2{side}") for side in "ab"]
    forks += [_chain(p, double, f"branch3x3dbl_3{side}") for side in "ab"]
    return jnp.concatenate([_chain(p, x, "branch1x1"), *forks, _chain(p, pool(x), "branch_pool")], axis=-1)


_KINDS = {_A: _a, _B: _b, _C: _c, _D: _d, _E: _e}


def _chain(p: Params, x: jax.Array, *names: str) -> jax.Array:
    for name in names:
        x = _conv(p[name], x)
    return x


def _halve(p: Params, x: jax.Array) -> jax.Array:
    return _conv(p, x, stride=2, padding="VALID")


def _conv(p: Params, x: jax.Array, *, stride: int = 1, padding: str = "SAME") -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), padding, dimension_numbers=layout)
    return jax.nn.relu(x + p["bias"][None, None, None])


def _max_pool(x: jax.Array, *, stride: int = 1) -> jax.Array:
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean_pool(x: jax.Array) -> jax.Array:
    """3 x 3 means at stride 1; the divisor counts real pixels only. Counts are numpy's, so that nothing is folded slowly."""
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3])
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return total * (1.0 / np.outer(rows, columns)).astype(np.float32)[None, :, :, None]


def _resize(x: jax.Array) -> jax.Array:
    if x.shape[1:3] == (SIZE, SIZE):
        return x
    rows, columns = (_bilinear(n) for n in x.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    # Images first: as in models/dinov2.py.
    x = jnp.einsum("bhwc,pw->bhpc", x, columns, precision=highest)
    return jnp.einsum("bhpc,oh->bopc", x, rows, precision=highest)


def _bilinear(size: int) -> np.ndarray:
    """Weights [299, size] of TensorFlow 1's bilinear rule: output i reads position i * size / 299."""
    at = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    weights = np.zeros((SIZE, size), np.float32)
    np.add.at(weights, (np.arange(SIZE), low), 1 - (at - low))
    np.add.at(weights, (np.arange(SIZE), high), at - low)
    return weights.astype(np.float32)
