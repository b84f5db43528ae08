"""Schedules, clipping, and the average that one published port has inverted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dip_jax.config import Optim
from dip_jax.training.optim import ema_decays, learning_rate, make_optimizer


def test_schedules():
    constant = learning_rate(Optim(learning_rate=2.0, warmup_steps=10), total_steps=100)
    np.testing.assert_allclose([constant(k) for k in (0, 5, 10, 99)], [0, 1, 2, 2])
    cosine = learning_rate(Optim(learning_rate=2.0, warmup_steps=10, schedule="cosine"), total_steps=110)
    np.testing.assert_allclose([cosine(k) for k in (0, 10, 60, 110)], [0, 2, 1, 0], atol=1e-6)


def test_first_adamw_step_is_the_learning_rate_whatever_the_gradient():
    params = {"w": jnp.ones(3)}
    optimizer = make_optimizer(Optim(learning_rate=0.1), total_steps=10)
    updates, _ = optimizer.update({"w": jnp.asarray([1e-3, 1.0, -50.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1, -0.1, 0.1], rtol=1e-4)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.9, 0.999), (0.0, 0.999)])
def test_adamw_is_that_of_float64_over_a_thousand_steps(b1, b2):
    """Within 1e-6 of each update's norm, where 1 - b2^k in float32 is off by 7e-6 in all of them."""
    optim, count = Optim(learning_rate=1.0, b1=b1, b2=b2, weight_decay=0.0), 1000
    optimizer, params = make_optimizer(optim, total_steps=count), {"w": jnp.zeros(64)}
    gradients = np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)

    def advance(state, gradient):
        updates, state = optimizer.update({"w": gradient}, state, params)
        return state, updates["w"]

    updates = jax.jit(lambda state: jax.lax.scan(advance, state, jnp.asarray(gradients))[1])(optimizer.init(params))
    mu = nu = np.zeros(64)
    for k, (gradient, update) in enumerate(zip(gradients.astype(np.float64), updates, strict=True), 1):
        mu, nu = b1 * mu + (1 - b1) * gradient, b2 * nu + (1 - b2) * gradient**2
        expected = -mu / (1 - b1**k) / (np.sqrt(nu / (1 - b2**k)) + optim.eps)
        assert np.linalg.norm(update - expected) <= 1e-6 * np.linalg.norm(expected), k


def test_the_state_is_that_of_optax_adamw():
    """So that checkpoints of earlier versions are read."""
    params = {"w": jnp.ones(3)}
    ours, theirs = (o.init(params) for o in (make_optimizer(Optim(grad_clip=None), total_steps=10), optax.adamw(lambda k: 0.1)))
    assert jax.tree_util.tree_structure(ours) == jax.tree_util.tree_structure(theirs)


@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_clipping_acts_on_the_global_norm(grad_clip):
    params = {"w": jnp.zeros(1), "b": jnp.zeros(1)}
    # Only a state that remembers the raw gradient can tell: AdamW's first moment does.
    optimizer = make_optimizer(Optim(grad_clip=grad_clip, b1=0.9), total_steps=10)
    _, state = optimizer.update({"w": jnp.asarray([30.0]), "b": jnp.asarray([40.0])}, optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    scale = 1 if grad_clip is None else 1 / 50
    np.testing.assert_allclose(first_moment["w"], 0.1 * 30 * scale, rtol=1e-5)
    np.testing.assert_allclose(first_moment["b"], 0.1 * 40 * scale, rtol=1e-5)


def test_ema_decays():
    assert [float(x) for x in ema_decays(Optim(ema_decays=(0.9999, 0.5)), jnp.asarray(0))] == pytest.approx([0.9999, 0.5])
    warmed = Optim(ema_decays=(0.99, 0.3), ema_warmup=True)
    slow, fast = jax.vmap(lambda k: ema_decays(warmed, k))(jnp.asarray([0, 10, 100_000]))
    np.testing.assert_allclose(slow, [0.1, 11 / 20, 0.99], rtol=1e-6)
    np.testing.assert_allclose(fast, [0.1, 0.3, 0.3], rtol=1e-6)
