"""Small models of every head and placement, and random parameters for them."""

import functools

import jax
import jax.numpy as jnp

from dip_jax import config
from dip_jax.models.detailers import HEADS
from dip_jax.models.dip import from_config
from dip_jax.models.placement import PLACEMENTS

REAL_HEADS = [head for head in HEADS if head != "none"]
COMBINATIONS = [(head, place) for head in REAL_HEADS for place in PLACEMENTS] + [("none", "post_hoc")]
SMALL = {
    "depth": 2,
    "width": 32,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": (16, 8),
    "num_classes": 5,
    "head_width": 8,
    "head_depth": 2,
    "dtype": "float32",
    "remat": "none",
    "head_remat": False,
}


@functools.cache
def small(**changed):
    return from_config(config.Model(**{**SMALL, **changed}))


def randomise(params, seed=0):
    """Every entry away from its initial value, zeros and ones included."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [a + 0.1 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def assert_same(a, b, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(float(jnp.abs(y).max()), 1e-6)
        assert float(jnp.abs(x - y).max()) <= tolerance * scale, jax.tree_util.keystr(path)
