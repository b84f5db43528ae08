"""Solvers on velocities with known answers; guidance; determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dip_jax import config, sampler

SHAPE = (4, 4, 3)
SOLVERS = ("euler", "heun", "ab2", "sde")


def run(predict, *, batch=3, key=0, indices=None, labels=None, shape=SHAPE, **sample):
    sample = config.Sample(**{"guidance": 1.0, **sample})
    indices = jnp.arange(batch, dtype=jnp.int32) if indices is None else jnp.asarray(indices, jnp.int32)
    labels = jnp.zeros(len(indices), jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    draw = jax.jit(
        lambda indices, labels: sampler.draw(
            predict, key=jax.random.key(key), indices=indices, labels=labels, image_shape=shape, sample=sample, null_label=9
        )
    )
    return np.asarray(draw(indices, labels))


def start(batch=3, shape=SHAPE, key=0):
    """The noise that the samples start from: what a velocity of zero leaves."""
    return run(lambda x, t, y: jnp.zeros_like(x), batch=batch, shape=shape, key=key, steps=1, solver="euler")


def per_image(t):
    return t[:, None, None, None]


def exact_gaussian(mean, scale):
    """The velocity of data N(mean, scale^2): E[x - eps | x_t], whose flow is known in closed form."""

    def predict(x, t, y):
        t = per_image(t)
        variance = (t * scale) ** 2 + (1 - t) ** 2
        return mean + (t * scale**2 - (1 - t)) / variance * (x - t * mean)

    return predict


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
@pytest.mark.parametrize("t_shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_constant_velocity_is_exact(solver, steps, t_shift):
    velocity = np.asarray(jax.random.normal(jax.random.key(5), SHAPE))
    x = run(lambda x, t, y: jnp.broadcast_to(velocity, x.shape), solver=solver, steps=steps, t_shift=t_shift)
    np.testing.assert_allclose(x, start() + velocity, atol=1e-6)


@pytest.mark.parametrize("t_shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", ["heun", "ab2"])
def test_second_order_solvers_are_exact_on_a_velocity_linear_in_t(solver, steps, t_shift):
    x = run(lambda x, t, y: jnp.broadcast_to(3 - 4 * per_image(t), x.shape), solver=solver, steps=steps, t_shift=t_shift)
    np.testing.assert_allclose(x, start() + 1, atol=2e-6)
