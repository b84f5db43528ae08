"""The projectors and the loss of representation alignment, each against plain numpy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced import products

from dip_jax.models import cost
from dip_jax.models.alignment import PROJECTORS, Projector, alignment_loss, spatial_norm
from dip_jax.runtime import sharding

SMALL = Projector("mlp", width=12, features=7, grid=(2, 3), dtype="float32")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def run(kind: str, tokens: np.ndarray):
    projector = dataclasses.replace(SMALL, kind=kind)
    params = projector.init(jax.random.key(1))
    return float64(params), jax.jit(projector.apply)(params, jnp.asarray(tokens))


def test_mlp_is_three_linear_maps():
    tokens = normal(2, 6, 12)
    params, got = run("mlp", tokens)
    x = tokens.astype(np.float64)
    for name in ("in", "hidden", "out"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        if name != "out":
            x = x / (1 + np.exp(-x))
    np.testing.assert_allclose(got, x, atol=1e-6)


def test_conv_sees_the_neighbours_on_the_grid():
    tokens = normal(2, 6, 12)
    params, got = run("conv", tokens)
    padded = np.pad(tokens.astype(np.float64).reshape(2, 2, 3, 12), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 2, 3, 7)) + params["bias"]
    for i in range(3):
        for j in range(3):
            expected += padded[:, i : i + 2, j : j + 3] @ params["kernel"][i, j]
    np.testing.assert_allclose(got, expected.reshape(2, 6, 7), atol=1e-6)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_projectors_start_as_pytorch_starts_them(kind):
    projector = Projector(kind, width=64, features=32, grid=(2, 2))
    bound = 1 / np.sqrt(64 * (9 if kind == "conv" else 1))
    for array in jax.tree.leaves(jax.jit(projector.init)(jax.random.key(0))):
        assert array.dtype == np.float32
        assert 0.8 * bound < np.abs(array).max() <= bound
        assert array.ndim == 1 or np.std(array) == pytest.approx(bound / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_parameter_has_its_logical_axes(kind):
    projector = dataclasses.replace(SMALL, kind=kind)

    def fits(axes, array):
        assert len(axes) == array.ndim
        sharding.spec(axes)

    jax.tree.map(fits, projector.logical_axes(), jax.eval_shape(projector.init, jax.random.key(0)), is_leaf=sharding.is_axes)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_flops_are_those_of_the_traced_products(kind):
    projector = dataclasses.replace(SMALL, kind=kind)
    params = jax.eval_shape(projector.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(projector.apply)(params, jax.ShapeDtypeStruct((1, 6, 12), np.float32))
    assert cost.projector_flops(projector) == products(jaxpr.jaxpr)


def test_loss_is_one_minus_the_mean_cosine():
    a, b = normal(2, 5, 9), normal(2, 5, 9, seed=1)
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosine = (x * y).sum(-1) / np.maximum(np.linalg.norm(x, axis=-1), 1e-8) / np.maximum(np.linalg.norm(y, axis=-1), 1e-8)
    np.testing.assert_allclose(alignment_loss(jnp.asarray(a), jnp.asarray(b)), 1 - cosine.mean(), rtol=1e-6)
    np.testing.assert_allclose(alignment_loss(jnp.asarray(3 * a), jnp.asarray(-2 * a)), 2, rtol=1e-6)


def test_loss_of_half_precision_tokens_is_float32():
    a, b = (jnp.asarray(normal(2, 5, 64, seed=seed), jnp.bfloat16) for seed in (0, 1))
    loss = alignment_loss(a, b)
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, alignment_loss(a.astype(np.float32), b.astype(np.float32)), rtol=1e-7)


def test_short_tokens_are_divided_by_the_smallest_length():
    """As torch's cosine_similarity: below 1e-8 the cosine fades to zero, and a zero token has a gradient."""
    a, b = np.zeros((1, 2, 4), np.float32), np.ones((1, 2, 4), np.float32)
    a[0, 1, 0] = 2.5e-9
    value, gradient = jax.value_and_grad(alignment_loss)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(value, 1 - (0 + 0.25 * 0.5) / 2, rtol=1e-6)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_spatial_norm_is_over_the_tokens_of_each_image():
    y = 3 * normal(2, 6, 5) + 1
    y[:, :, 4] = 2.0  # the same everywhere: nothing remains
    exact = y.astype(np.float64)
    expected = (exact - exact.mean(1, keepdims=True)) / (exact.std(1, keepdims=True, ddof=1) + 1e-6)
    np.testing.assert_allclose(spatial_norm(jnp.asarray(y)), expected, atol=1e-5)
