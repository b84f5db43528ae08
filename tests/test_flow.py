"""The objective: properties of the path, its conversions, its time distribution and its label dropping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dip_jax import flow
from dip_jax.config import Flow, Model

SHAPE = (64, 8, 8, 3)


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(0), 3)
    x, eps = (jax.random.normal(key, SHAPE) for key in keys[:2])
    return x, eps, jax.random.uniform(keys[2], (64,), minval=0.1, maxval=0.9)


def test_path_runs_from_noise_to_data(batch):
    x, eps, _ = batch
    np.testing.assert_array_equal(flow.interpolate(x, eps, jnp.zeros(64)), eps)
    np.testing.assert_array_equal(flow.interpolate(x, eps, jnp.ones(64)), x)


def test_velocity_is_the_derivative_of_the_path(batch):
    x, eps, t = batch
    _, derivative = jax.jvp(lambda t: flow.interpolate(x, eps, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(flow.velocity(x, eps), derivative, atol=1e-5)


@pytest.mark.parametrize("kind", ["v", "x", "eps"])
def test_every_prediction_gives_the_same_velocity_and_data(batch, kind):
    x, eps, t = batch
    x_t = flow.interpolate(x, eps, t)
    said = {"v": flow.velocity(x, eps), "x": x, "eps": eps}[kind]
    v = flow.to_velocity(said, x_t, t, model=Model(prediction=kind))
    np.testing.assert_allclose(v, flow.velocity(x, eps), atol=2e-5)
    np.testing.assert_allclose(flow.to_data(v, x_t, t), x, atol=2e-5)


@pytest.mark.parametrize(("kind", "t"), [("x", 1.0), ("eps", 0.0)])
def test_conversions_stay_finite_where_they_would_divide_by_zero(batch, kind, t):
    x, eps, _ = batch
    v = flow.to_velocity(x, eps, jnp.full(64, t), model=Model(prediction=kind))
    assert jnp.isfinite(v).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.8)])
def test_times_are_logit_normal(mean, std):
    t = np.asarray(flow.sample_times(jax.random.key(1), 20_000, flow=Flow(t_mean=mean, t_std=std)))
    assert t.dtype == np.float32 and t.min() > 0 and t.max() < 1
    assert stats.kstest(np.log(t / (1 - t)), "norm", args=(mean, std)).pvalue > 1e-3


def test_shift_above_one_favours_noise_and_keeps_the_ends():
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(flow.shift_times(t, 1.0), t)
    shifted = flow.shift_times(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and bool((shifted[1:-1] < t[1:-1]).all())
    np.testing.assert_allclose(flow.shift_times(jnp.full(1, 0.5), 3.0), 0.25)


def test_labels_drop_to_the_null_class_at_the_given_rate():
    y = jnp.arange(20_000) % 10
    dropped = flow.drop_labels(jax.random.key(2), y, rate=0.1, null_label=10)
    assert bool(((dropped == y) | (dropped == 10)).all())
    assert stats.binomtest(int((dropped == 10).sum()), 20_000, 0.1).pvalue > 1e-3
    np.testing.assert_array_equal(flow.drop_labels(jax.random.key(2), y, rate=0.0, null_label=10), y)


@pytest.mark.parametrize("kind", ["v", "x", "eps"])
def test_loss_is_zero_for_the_truth_and_the_mean_square_of_the_velocity_otherwise(batch, kind):
    x, _, _ = batch
    model = Model(prediction=kind, num_classes=10)
    c = flow.corrupt(jax.random.key(3), x, jnp.zeros(64, jnp.int32), flow=Flow(), model=model)
    assert float(flow.loss(lambda x_t, t, y: c.target, c, model=model)) == 0
    divisor = {"v": np.ones(64), "x": np.maximum(1 - c.t, 0.05), "eps": np.maximum(c.t, 0.05)}[kind]
    off_by_two = float(flow.loss(lambda x_t, t, y: c.target + 2, c, model=model))
    assert off_by_two == pytest.approx(np.mean((2 / divisor) ** 2), rel=1e-4)


def test_corrupt_draws_independent_noise_times_and_drops(batch):
    x, _, _ = batch
    c = flow.corrupt(jax.random.key(4), x, jnp.zeros(64, jnp.int32), flow=Flow(label_dropout=0.5), model=Model(num_classes=10))
    eps = (c.x_t - c.t[:, None, None, None] * x) / (1 - c.t[:, None, None, None])
    np.testing.assert_allclose(c.target, x - eps, atol=1e-3)
    per_image = np.asarray(eps.mean((1, 2, 3)))
    assert abs(np.corrcoef(per_image, c.t)[0, 1]) < 0.4
    assert abs(np.corrcoef(np.asarray(c.y == 10), c.t)[0, 1]) < 0.4
