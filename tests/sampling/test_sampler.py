"""Solvers on velocities with known answers; guidance; determinism."""

import dataclasses
import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dip_jax import config
from dip_jax.sampling import sampler

SHAPE = (4, 4, 3)
SOLVERS = ("euler", "heun", "ab2", "sde")


QUICK = {"xla_backend_optimization_level": 0}  # most of the time here is compiling


def settings(**sample):
    return config.Sample(**{"guidance": 1.0, **sample})


def run(predict, *, batch=3, key=0, indices=None, labels=None, shape=SHAPE, ahead=None, **sample):
    sample = settings(**sample)
    indices = jnp.arange(batch, dtype=jnp.int32) if indices is None else jnp.asarray(indices, jnp.int32)
    labels = jnp.zeros(len(indices), jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    draw = jax.jit(
        lambda indices, labels: sampler.draw(
            predict,
            key=jax.random.key(key),
            indices=indices,
            labels=labels,
            image_shape=shape,
            sample=sample,
            null_label=9,
            ahead=ahead,
        ),
        compiler_options=QUICK,
    )
    return np.asarray(draw(indices, labels))


@functools.cache
def start(batch=3):
    """The noise that the samples start from: what a velocity of zero leaves."""
    return run(lambda x, t, y: jnp.zeros_like(x), batch=batch, steps=1, solver="euler")


def per_image(t):
    return t[:, None, None, None]


def exact_gaussian(mean, scale):
    """The velocity of data N(mean, scale^2): E[x - eps | x_t], whose flow is known in closed form."""

    def predict(x, t, y):
        t = per_image(t)
        variance = (t * scale) ** 2 + (1 - t) ** 2
        return mean + (t * scale**2 - (1 - t)) / variance * (x - t * mean)

    return predict


GRIDS = [(1, 1.0), (7, 3.0)]


@pytest.mark.parametrize(("steps", "t_shift"), GRIDS)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_constant_velocity_is_exact(solver, steps, t_shift):
    velocity = np.asarray(jax.random.normal(jax.random.key(5), SHAPE))
    x = run(lambda x, t, y: jnp.broadcast_to(velocity, x.shape), solver=solver, steps=steps, t_shift=t_shift)
    np.testing.assert_allclose(x, start() + velocity, atol=1e-6)


@pytest.mark.parametrize(("steps", "t_shift"), GRIDS)
@pytest.mark.parametrize("solver", ["heun", "ab2"])
def test_second_order_solvers_are_exact_on_a_velocity_linear_in_t(solver, steps, t_shift):
    x = run(lambda x, t, y: jnp.broadcast_to(3 - 4 * per_image(t), x.shape), solver=solver, steps=steps, t_shift=t_shift)
    np.testing.assert_allclose(x, start() + 1, atol=2e-6)


@pytest.mark.parametrize(
    ("solver", "order", "t_shift"), [("euler", 1, 1.0), ("heun", 2, 2.0), ("ab2", 2, 1.0), ("ab2", 2, 2.0)]
)
def test_order_of_accuracy(solver, order, t_shift):
    """dx/dt = 3 t^2 x takes x to e x."""

    def error(steps):
        drawn = run(lambda x, t, y: 3 * per_image(t) ** 2 * x, solver=solver, t_shift=t_shift, steps=steps)
        return np.abs(drawn - np.e * start()).max()

    assert np.log2(error(64) / error(128)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("sde_noise", [0.5, 1.0, 2.0])
def test_sde_keeps_the_marginals_of_a_gaussian(sde_noise):
    mean, scale, count = 0.3, 0.5, 200
    way = trajectory(exact_gaussian(mean, scale), batch=count, frames=5, solver="sde", steps=200, sde_noise=sde_noise)
    for t, x in zip([*way.times.tolist(), 1.0], [*way.noisy, way.images], strict=True):
        x = np.asarray(x)
        assert abs(x.mean() - t * mean) < 4 * np.hypot(t * scale, 1 - t) / np.sqrt(x.size) + 0.005
        assert abs(x.std() / np.hypot(t * scale, 1 - t) - 1) < 0.03
    there = np.corrcoef(np.asarray(way.noisy[0]).ravel(), np.asarray(way.images).ravel())[0, 1]
    assert there < 0.6  # the ODE keeps the noise it started from (correlation 1), a path of its own forgets it


def test_sde_without_noise_is_euler():
    predict = exact_gaussian(0.3, 0.5)
    without = run(predict, solver="sde", steps=9, sde_noise=0.0)
    np.testing.assert_allclose(without, run(predict, solver="euler", steps=9), atol=1e-6)


def test_sde_ends_on_the_expected_image():
    """The last step adds no noise: with one step, x = eps + v is the mean of the data given pure noise."""
    np.testing.assert_allclose(run(exact_gaussian(0.3, 0.5), solver="sde", steps=1), 0.3, atol=1e-6)


def trajectory(predict, *, batch=2, frames=4, **sample):
    sample = settings(**sample)
    indices, labels = jnp.arange(batch, dtype=jnp.int32), jnp.zeros(batch, jnp.int32)
    run = jax.jit(
        lambda: sampler.draw_trajectory(
            predict,
            key=jax.random.key(0),
            indices=indices,
            labels=labels,
            image_shape=SHAPE,
            sample=sample,
            null_label=9,
            frames=frames,
        ),
        compiler_options=QUICK,
    )
    return run()


@pytest.mark.parametrize("solver", SOLVERS)
def test_trajectory_starts_from_noise_and_ends_where_draw_does(solver):
    predict, sample = exact_gaussian(0.3, 0.5), {"solver": solver, "steps": 10, "guidance": 3.0, "interval": (0.3, 0.7)}
    way = trajectory(predict, batch=3, frames=4, **sample)
    np.testing.assert_array_equal(way.images, run(predict, **sample))
    np.testing.assert_array_equal(way.noisy[0], start())
    np.testing.assert_allclose(way.times, [0, 0.3, 0.6, 0.9], atol=1e-6)
    velocity = (way.expected[1] - way.noisy[1]) / 0.7
    np.testing.assert_allclose(velocity, predict(way.noisy[1], jnp.full(3, 0.3), None), rtol=1e-3, atol=1e-5)


def test_trajectory_of_fewer_steps_than_frames_shows_each_step_once():
    assert trajectory(exact_gaussian(0.0, 1.0), frames=8, steps=3).times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])


def by_label(x, t, y):
    """A velocity that depends on everything; the null label is 9."""
    return jnp.sin(x) * (1 + per_image(t)) + jnp.where(y == 9, -0.5, 0.1 * y.astype(jnp.float32))[:, None, None, None]


def computing_and_discarding(predict, labels, sample):
    """Euler with both halves always computed and the guidance scale 1 outside the interval."""
    x = start(len(labels))
    grid = sampler.time_grid(sample).astype(np.float32)
    low, high = np.float32(sample.interval)  # no end of these intervals is rounded to the other side of a time of the grid
    for t, then in itertools.pairwise(grid):
        times = jnp.full(len(labels), t)
        both = [np.asarray(predict(x, times, y)) for y in (jnp.full_like(labels, 9), labels)]
        scale = sample.guidance if low < t < high else 1.0
        x = x + (then - t) * (both[0] + np.float32(scale) * (both[1] - both[0]))
    return x


@pytest.mark.parametrize("interval", [(0.1, 1.0), (0.0, 1.0), (0.35, 0.65), (0.5, 0.5), (0.0, 0.4)])
def test_skipping_outside_the_interval_changes_nothing(interval):
    sample, labels = {"steps": 10, "guidance": 3.5, "interval": interval}, jnp.array([0, 4, 8], jnp.int32)
    drawn = run(by_label, labels=labels, **sample)
    np.testing.assert_allclose(drawn, computing_and_discarding(by_label, labels, config.Sample(**sample)), atol=2e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_unconditional_half_runs_only_inside_the_interval(solver):
    """Counts what the compiled trajectory really evaluates."""
    seen = []

    def predict(x, t, y):
        jax.debug.callback(lambda t, y: seen.append((float(t[0]), np.asarray(y).tolist())), t, y)
        return by_label(x, t, y)

    sample = {"solver": solver, "steps": 10, "guidance": 3.5, "interval": (0.2, 0.6)}
    run(predict, labels=[3, 4], indices=[0, 1], **sample)
    jax.effects_barrier()
    inside = [np.float32(0.2) < np.float32(t) < np.float32(0.6) for t, _ in seen]
    assert [y for _, y in seen] == [[9, 3, 9, 4] if guided else [3, 4] for guided in inside]
    assert sampler.nfe(settings(**sample)) == (len(seen), sum(inside))


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_one_is_conditional(solver):
    def conditional(x, t, y):
        assert x.shape[0] == 3, "the unconditional half ran"
        return by_label(x, t, y)

    labels = [0, 4, 8]
    drawn = run(conditional, labels=labels, solver=solver, steps=5, guidance=1.0, interval=(0.0, 1.0))
    np.testing.assert_array_equal(drawn, run(by_label, labels=labels, solver=solver, steps=5, interval=(0.5, 0.5)))


def test_interval_is_strict_and_excludes_data():
    guided = sampler.plan(config.Sample(steps=100, interval=(0.1, 1.0))).guided
    assert guided.tolist() == [k > 10 for k in range(100)]  # t = 0.1 itself is outside
    heun = sampler.plan(config.Sample(steps=100, interval=(0.1, 1.0), solver="heun"))
    assert not heun.guided[heun.time == 1].any() and heun.guided.sum() == 2 * 89


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("steps", "t_shift", "interval", "ends"),
    [
        (10, 3.0, (0.25, 0.75), (5, 9)),
        (9, 0.5, (0.2, 0.8), (1, 6)),
        (18, 0.5, (0.2, 0.8), (2, 12)),
        (27, 0.5, (0.2, 0.8), (3, 18)),
        (10, 1.0, (0.3, 0.7), (3, 7)),
    ],
)
def test_a_time_of_the_grid_at_an_end_of_the_interval_is_outside(solver, steps, t_shift, interval, ends):
    """The grid's times are fractions; rounding either way, in float32 or in float64, moves none across an end."""
    sample = config.Sample(steps=steps, t_shift=t_shift, interval=interval, solver=solver, guidance=2.0)
    exact = [Fraction(k) / (k + (steps - k) * Fraction(t_shift)) for k in range(steps)]
    assert [exact[k] for k in ends] == [Fraction(str(end)) for end in interval]
    table = sampler.plan(sample)
    assert table.guided[table.starts].tolist() == [ends[0] < k < ends[1] for k in range(steps)]
    wider = dataclasses.replace(sample, interval=(interval[0] - 1e-9, interval[1] + 1e-9))  # one and the same in float32
    table = sampler.plan(wider)
    assert table.guided[table.starts].tolist() == [ends[0] <= k <= ends[1] for k in range(steps)]


@pytest.mark.parametrize(
    ("solver", "expected"), [("euler", (100, 89)), ("heun", (200, 178)), ("ab2", (101, 89)), ("sde", (100, 89))]
)
def test_network_evaluations(solver, expected):
    assert sampler.nfe(config.Sample(solver=solver, interval=(0.1, 1.0))) == expected
    assert sampler.nfe(config.Sample(solver=solver, guidance=1.0)) == (expected[0], 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver):
    sample = {"solver": solver, "steps": 4, "guidance": 2.0}
    together = run(by_label, indices=range(6), labels=[1, 2, 3, 4, 5, 6], **sample)
    apart = run(by_label, indices=[4, 0], labels=[5, 1], **sample)
    np.testing.assert_allclose(apart, together[[4, 0]], atol=1e-6)
    elsewhere = run(by_label, indices=[4, 0], labels=[5, 1], key=1, **sample)
    assert np.abs(elsewhere - apart).mean() > 0.1
    assert np.abs(together[0] - together[1]).mean() > 0.1


def test_noise_is_standard_normal():
    x = start(batch=500).ravel()
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.02


@pytest.mark.parametrize(("steps", "t_shift"), [(1, 1.0), (7, 1.0), (100, 1.0), (1000, 3.0)])
def test_time_grid(steps, t_shift):
    grid = sampler.time_grid(config.Sample(steps=steps, t_shift=t_shift))
    s = np.arange(steps + 1) / steps
    np.testing.assert_allclose(grid, s / (s + (1 - s) * t_shift), atol=1e-12)
    assert grid[0] == 0 and grid[-1] == 1 and np.all(np.diff(grid) > 0)


def test_uint8_rule():
    x = np.array([-7, -1, -1 + 1 / 255, -1 + 1.02 / 255, 0, 1 - 0.98 / 255, 1, 9], np.float32)
    expected = np.clip(np.round((x.astype(np.float64) + 1) * 127.5), 0, 255)
    drawn = np.asarray(sampler.to_uint8(jnp.asarray(x).reshape(1, 8, 1, 1)))
    assert drawn.dtype == np.uint8 and drawn.ravel().tolist() == expected.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_made_ahead_reaches_the_evaluation_it_was_made_for(solver):
    """Ahead, each time meets each label; every evaluation gets those of its own times and labels, guided or not."""
    calls, seen = [], []

    def ahead(times, labels):
        calls.append(times.shape)
        return {"t": jnp.broadcast_to(times[:, None], (len(times), len(labels))), "y": jnp.tile(labels[None], (len(times), 1))}

    def predict(x, t, y, given):
        seen.append(x.shape[0])
        wrong = jnp.abs(given["t"] - t) + jnp.abs(given["y"] - y).astype(jnp.float32)
        return by_label(x, t, y) + 1e3 * per_image(wrong)

    sample = {"labels": [1, 2, 5], "solver": solver, "steps": 7, "guidance": 3.0, "interval": (0.3, 0.7)}
    np.testing.assert_array_equal(run(predict, ahead=ahead, **sample), run(by_label, **sample))
    assert len(seen) == 3 and sorted(seen) == [3, 3, 6]  # traced once per segment
    assert len(calls) == 4  # for the labels in each segment, for no class in the guided one
