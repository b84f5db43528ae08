"""Attention as a TPU computes it is JAX's own: values, gradients, and what the backward pass keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_same, randomise, small
from traced import equations

from dip_jax.models.layers import attend_in_few_passes
from dip_jax.runtime import target

SHAPE = (3, 10, 2, 8)  # images, tokens, heads, numbers of a head


def values_and_gradients(attend, dtype, *, wide: float = 1.0) -> tuple:
    q, k, v, weights = (jax.random.normal(jax.random.key(i), SHAPE, dtype) for i in range(4))

    def found(q, k, v, weights):
        y, backward = jax.vjp(attend, wide * q, k, v)
        return y, *backward(weights)

    with jax.numpy_dtype_promotion("standard"):  # JAX's own adds bfloat16 to float32
        return jax.tree.map(lambda a: np.asarray(a, np.float32), jax.jit(found)(q, k, v, weights))


JAX_S_OWN = functools.partial(jax.nn.dot_product_attention, implementation="xla")


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_it_is_jax_s_own(dtype, tolerance):
    found = values_and_gradients(attend_in_few_passes, dtype)
    q, k, v, weights = (jax.random.normal(jax.random.key(i), SHAPE, dtype).astype(jnp.float32) for i in range(4))
    y, backward = jax.vjp(JAX_S_OWN, q, k, v)
    assert_same(found, (y, *backward(weights)), tolerance)


def test_in_halves_its_gradients_are_as_near_as_jax_s():
    expected = values_and_gradients(JAX_S_OWN, jnp.float32)
    ours, theirs = (values_and_gradients(attend, jnp.bfloat16) for attend in (attend_in_few_passes, JAX_S_OWN))
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert np.linalg.norm(one - right) < 1.5 * np.linalg.norm(other - right)


def test_large_scores_stay_finite():
    found, expected = (values_and_gradients(attend, jnp.float32, wide=1e4) for attend in (attend_in_few_passes, JAX_S_OWN))
    assert all(np.isfinite(array).all() for array in found)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def of_a_model(platform: str, monkeypatch) -> tuple:
    """Value and gradient of a small model under rematerialisation, and the program that makes them."""
    monkeypatch.setattr(target, "platform", lambda: platform)
    model = small(head="none", remat="dots")
    params = randomise(jax.jit(model.init)(jax.random.key(1)))
    x, t, y = jax.random.normal(jax.random.key(2), (2, 16, 8, 3)), jnp.linspace(0.1, 0.9, 2), jnp.arange(2)
    step = jax.value_and_grad(lambda params: jnp.sum(jnp.sin(model.apply(params, x, t, y))))
    return jax.jit(step)(params), jax.make_jaxpr(step)(params)


def test_a_model_s_gradients_are_the_same_and_no_result_is_made_twice(monkeypatch):
    (found, ours), (expected, _) = (of_a_model(platform, monkeypatch) for platform in ("tpu", ""))
    assert_same(found, expected, 2e-5)
    pairs = (2, 2, 2, 2)  # images, heads and pairs of tokens
    products = [one for one in equations(ours.jaxpr) if one.primitive.name == "dot_general"]
    # The result, and the gradients of values, queries and keys; made again it would be five.
    assert sum(pairs in {operand.aval.shape for operand in one.invars} for one in products) == 4
