"""Our solvers beside the authors' samplers, whose trajectories are recorded: where they are the same, and where not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_cases as case

from dip_jax import config
from dip_jax.sampling import sampler


@functools.cache
def theirs(name):
    with np.load(case.ANSWERS) as file:
        return file[name]


@pytest.fixture
def ours(monkeypatch):
    """Runs one of the cases: x before each step and after the last, [steps + 1, *SHAPE]."""
    monkeypatch.setattr(sampler, "_start", lambda key, indices, shape: (jax.random.split(key, 3), jnp.asarray(case.noise())))

    def run(name):
        settings = config.Sample(**case.CASES[name])
        options = {"image_shape": case.SHAPE[1:], "sample": settings, "null_label": case.NULL_LABEL, "frames": settings.steps}
        labels, indices = jnp.array(case.LABELS, jnp.int32), jnp.arange(len(case.LABELS), dtype=jnp.int32)
        key = jax.random.key(0)
        draw = jax.jit(lambda: sampler.draw_trajectory(velocity, key=key, indices=indices, labels=labels, **options))
        way = draw()
        return np.concatenate([way.noisy, way.images[None]])

    return run


def velocity(x, t, y):
    return case.velocity(jnp, x, t, y.astype(jnp.float32))


def at(x, t, *, guidance):
    """The velocity of the recorded labels, guided."""
    labels = np.array(case.LABELS, np.float32)
    none, own = (case.velocity(np, x, np.full(len(labels), t), y) for y in (np.full_like(labels, case.NULL_LABEL), labels))
    return none + guidance * (own - none)


@pytest.mark.parametrize("name", [name for name in case.CASES if name.startswith("euler")])
def test_euler_is_theirs(name, ours):
    np.testing.assert_allclose(ours(name), theirs(name), rtol=0, atol=1e-6)


def test_euler_at_an_end_that_their_grid_rounds_across(ours):
    """Ten steps shifted by 3: the last starts at 0.75; their float32 grid has 0.74999994 and guides it, ours does not."""
    name = "rounded end, euler"
    ways, guidance = (ours(name), theirs(name)), case.CASES[name]["guidance"]
    np.testing.assert_allclose(ways[0][:-1], ways[1][:-1], rtol=0, atol=1e-6)
    without, with_it = (at(ways[1][-2], 0.75, guidance=scale) for scale in (1.0, guidance))
    np.testing.assert_allclose(ways[0][-1] - ways[1][-1], 0.25 * (without - with_it), rtol=0, atol=2e-6)
    assert np.abs(with_it - without).max() > 0.05


def test_heun_is_theirs_until_its_last_step(ours):
    """They end with Euler; we evaluate the network at t = 1 too and correct the last step as the others."""
    ways, h = (ours("heun, no guidance"), theirs("heun, no guidance")), 1 / 8
    np.testing.assert_allclose(ways[0][:-1], ways[1][:-1], rtol=0, atol=1e-6)
    first, then = at(ways[1][-2], 1 - h, guidance=1.0), at(ways[1][-1], 1.0, guidance=1.0)
    np.testing.assert_allclose(ways[0][-1] - ways[1][-1], h / 2 * (then - first), rtol=0, atol=2e-6)
    assert np.abs(then - first).max() > 0.05


def test_heun_guides_each_evaluation_by_its_own_time(ours):
    """They decide by the time at which a step starts, for both evaluations of it: their first correction is not guided."""
    ways, h, guidance = (ours("heun"), theirs("heun")), 1 / 8, case.CASES["heun"]["guidance"]
    predicted = ways[1][0] + h * at(ways[1][0], 0.0, guidance=1.0)
    without, with_it = (at(predicted, h, guidance=scale) for scale in (1.0, guidance))
    np.testing.assert_allclose(ways[0][1] - ways[1][1], h / 2 * (with_it - without), rtol=0, atol=2e-6)
    assert np.abs(with_it - without).max() > 0.05
