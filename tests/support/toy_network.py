"""A feature network small enough to compute by hand, in the place of `lite0`."""

import time

import jax
import jax.numpy as jnp

from dip_jax.metrics import features
from dip_jax.metrics.features import Network

D = 6  # features: mean colour of the upper and the lower half


def halves(images: jax.Array) -> dict[str, jax.Array]:
    x = images.astype(jnp.float32)
    middle = x.shape[1] // 2
    pool = jnp.concatenate([x[:, :middle].mean(axis=(1, 2)), x[:, middle:].mean(axis=(1, 2))], axis=1)
    return {"pool": pool, "spatial": pool[:, :3] / 2, "logits": pool / 50}


def network(suffix: str = "_toy", *, delay: float = 0.0) -> Network:
    """`delay` seconds pass at each call."""
    compiled = jax.jit(halves)

    def apply(images: jax.Array) -> dict[str, jax.Array]:
        time.sleep(delay)
        return compiled(images)

    return Network("toy", suffix, "0" * 64, apply, lambda h, w: f"{h}x{w} as they are", {"pool": D, "spatial": 3})


def install(*, delay: float = 0.0) -> None:
    """Gives this process the toy under the name lite0."""
    features.NETWORKS["lite0"] = lambda weights: network(delay=delay)
    features.open_network.cache_clear()
