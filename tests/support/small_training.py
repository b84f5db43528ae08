"""Steps of training on random images, on any mesh: what the tests of the objective's options compare."""

import functools

import jax
import numpy as np

from dip_jax import config
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.training import optim, state, step

FIELDS = {
    "size": "tiny",
    "depth": 3,
    "width": 32,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": (16, 16),
    "num_classes": 3,
    "head": "none",
    "dtype": "float32",
    "remat": "none",
}


def batch(k: int, *, size: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 3, size).astype(np.int32)
    return {"image": rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8), "label": labels}


def run(
    model: dict,
    steps: int,
    *,
    flow: config.Flow | None = None,
    optimizer: config.Optim | None = None,
    mesh: config.Mesh | None = None,
    start=None,
    **step_options,
):
    """The state after `steps`, and the metrics of every step. `start` makes the first state of the fresh one."""
    network = dip.from_config(config.Model(**FIELDS | model))
    options = optimizer or config.Optim(learning_rate=1e-3, ema_decays=(0.9,))
    made = optim.make_optimizer(options, total_steps=10)
    sizes = mesh or config.Mesh(data=1)
    devices = sharding.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    with jax.set_mesh(devices):
        averages = len(options.ema_decays)
        places = state.state_shardings(network, made, devices, zero1=sizes.zero1, averages=averages)
        train_step = step.compile_train_step(
            network, made, places, devices, objective=flow or config.Flow(), optim=options, **step_options
        )
        now = state.init_sharded(network, made, 0, places)
        if start is not None:
            now = jax.device_put(start(now), places)
        history = []
        for k in range(steps):
            now, metrics = train_step(now, batch(k), jax.random.key(1))
            history.append({name: float(value) for name, value in metrics.items()})
    return now, history


def first_step(model: dict, **options) -> dict[str, float]:
    """The metrics of the first step."""
    return run(model, 1, **options)[1][0]


@functools.cache
def random_params(network: dip.DiP, seed: int = 0):
    """All parameters random, since zeros at the start would hide what they multiply."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
