"""A network 96 wide with every head, random weights, and how far bfloat16 is from float32: for the tests and a benchmark."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dip_jax import config
from dip_jax.models import dip

SIZES = {"depth": 3, "width": 96, "num_heads": 4, "patch_size": 16, "image_size": (64, 64), "num_classes": 7}
BATCH = 8

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x_t, t, y, and the velocity that is to come out


def model(head: str, dtype: str, **changed) -> dip.DiP:
    return dip.from_config(config.Model(head=head, dtype=dtype, **{**SIZES, **changed}))


def weights(network: dip.DiP) -> dict:
    """As initialised where that is not zero or one; norms near one, biases and tables away from zero."""

    def each(path, start):
        name = jax.tree_util.keystr(path)
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(start.shape)
        if "scale" in name:
            return np.float32(1 + 0.2 * noise)
        if "bias" in name or "table" in name:
            return np.float32((0.1 if "bias" in name else 0.5) * noise)
        return np.asarray(start) if np.any(start) else np.float32(noise / np.sqrt(start.shape[-2]))

    return jax.tree_util.tree_map_with_path(each, jax.jit(network.init)(jax.random.key(0)))


def inputs(network: dip.DiP) -> Inputs:
    random = np.random.RandomState(0)
    x, v = random.standard_normal((2, BATCH, *network.config.image_size, 3)).astype(np.float32)
    y = np.arange(BATCH) % (network.config.num_classes + 1)
    return x, np.linspace(0.1, 0.9, BATCH, dtype=np.float32), y.astype(np.int32), v


def loss(network: dip.DiP, params, x, t, y, v) -> tuple[jax.Array, jax.Array]:
    output = network.apply(params, x, t, y)
    return jnp.mean(jnp.square(output - v)), output


def run(network: dip.DiP, params, given: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(output, gradient of each tensor by its path)."""
    step = jax.jit(jax.value_and_grad(lambda params, *given: loss(network, params, *given), has_aux=True))
    with jax.numpy_dtype_promotion("standard"):  # off a mesh attention runs in bfloat16, as JAX's own function does
        (_, output), gradients = step(params, *given)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return np.asarray(output), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def error(found, exact) -> float:
    """Relative, in the L2 norm."""
    return float(np.linalg.norm(np.float64(found) - exact) / np.linalg.norm(np.float64(exact)))


def errors(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Of the whole gradient, and of the worst tensor."""
    each = {name: error(found[name], exact[name]) for name in exact}
    flat = [np.concatenate([np.ravel(tree[name]) for name in exact]) for tree in (found, exact)]
    return {"gradient": error(*flat), "worst": max(each.values()), "median": float(np.median(list(each.values())))}
