"""One step, for real: the average moves the right way, a bad number changes nothing, micro-batches and mesh do not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dip_jax import config
from dip_jax.models import dip
from dip_jax.runtime import sharding, target
from dip_jax.training import state, step
from dip_jax.training.optim import make_optimizer

MODEL = dip.from_config(
    config.Model(
        size="tiny",
        depth=2,
        width=32,
        num_heads=2,
        patch_size=8,
        image_size=(16, 16),
        num_classes=3,
        head_width=4,
        head_depth=2,
        dtype="float32",
        remat="none",
        head_remat=False,
    )
)
OPTIM = config.Optim(learning_rate=1e-2, ema_decays=(0.9,))


def random_batch(seed: int, size: int = 8) -> dict:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 3, size).astype(np.int32)}


@functools.cache
def compiled(mesh_sizes: config.Mesh, optim: config.Optim = OPTIM, devices: int = 8):
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[:devices])
    optimizer = make_optimizer(optim, total_steps=100)
    averages = len(optim.ema_decays)
    shardings = state.state_shardings(MODEL, optimizer, mesh, zero1=mesh_sizes.zero1, averages=averages)
    run = step.compile_train_step(MODEL, optimizer, shardings, mesh, objective=config.Flow(), optim=optim)
    return mesh, optimizer, shardings, run


def train(mesh_sizes: config.Mesh, steps: int, *, optim: config.Optim = OPTIM, devices: int = 8, bad: int | None = None):
    """The state and the metrics of every step; batch `bad`, if given, meets a NaN in the weights' gradient."""
    mesh, optimizer, shardings, run = compiled(mesh_sizes, optim, devices)
    history = []
    with jax.set_mesh(mesh):
        current = state.init_sharded(MODEL, optimizer, 0, shardings)
        for k in range(steps):
            current, metrics = run(current, random_batch(k), jax.random.key(7))
            history.append({name: float(value) for name, value in metrics.items()})
    return current, history


ONE = config.Mesh(data=1)


def test_loss_falls_and_metrics_are_finite():
    mesh, optimizer, shardings, run = compiled(ONE, devices=1)
    batch = random_batch(0)
    losses = []
    with jax.set_mesh(mesh):
        current = state.init_sharded(MODEL, optimizer, 0, shardings)
        for _ in range(30):
            current, metrics = run(current, batch, jax.random.key(0))
            losses.append(float(metrics["loss"]))
    assert int(current.step) == 30
    assert all(np.isfinite(losses)) and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_ema_moves_by_one_minus_decay():
    """The published inversion would give (1 - decay) * old + decay * new."""
    mesh, optimizer, shardings, run = compiled(ONE, devices=1)
    with jax.set_mesh(mesh):
        before = state.init_sharded(MODEL, optimizer, 0, shardings)
        start = jax.device_get(before.params)
        after, _ = run(before, random_batch(0), jax.random.key(0))
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, start, jax.device_get(after.params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), jax.device_get(after.ema), expected)


def test_a_bank_of_averages_is_the_recursion_and_leaves_the_run_as_it_was():
    """In float64 from the parameters after each step; all else is as with one alone."""
    bank = dataclasses.replace(OPTIM, ema_decays=(0.9, 0.5, 0.99))
    mesh, optimizer, shardings, run = compiled(ONE, bank, 1)
    history = []
    with jax.set_mesh(mesh):
        current = state.init_sharded(MODEL, optimizer, 0, shardings)
        expected = [jax.tree.map(np.float64, jax.device_get(current.params)) for _ in bank.ema_decays]
        for k in range(3):
            current, metrics = run(current, random_batch(k), jax.random.key(7))
            history.append({name: float(value) for name, value in metrics.items()})
            params = jax.device_get(current.params)
            for i, decay in enumerate(bank.ema_decays):
                expected[i] = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected[i], params)
    for found, wanted in zip(current.emas, expected, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), jax.device_get(found), wanted)
    alone, metrics = train(ONE, 3, devices=1)
    assert history == metrics
    kept = jax.device_get((alone.params, alone.opt_state, alone.ema))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((current.params, current.opt_state, current.ema)), kept)


def test_a_non_finite_gradient_changes_nothing_but_the_counter():
    mesh, optimizer, shardings, _ = compiled(ONE, devices=1)
    poisoned = dataclasses.replace(MODEL)

    def apply_all(*args, **kwargs):
        said = MODEL.apply_all(*args, **kwargs)
        return said._replace(prediction=said.prediction * jnp.nan)

    object.__setattr__(poisoned, "apply_all", apply_all)
    run = step.compile_train_step(poisoned, optimizer, shardings, mesh, objective=config.Flow(), optim=OPTIM)
    with jax.set_mesh(mesh):
        before = state.init_sharded(MODEL, optimizer, 0, shardings)
        kept = jax.device_get((before.params, before.opt_state, before.emas))
        after, metrics = run(before, random_batch(0), jax.random.key(0))
    assert float(metrics["skipped"]) == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((after.params, after.opt_state, after.emas)), kept)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_branch_refuses_updates_on_cpus_alone(platform, monkeypatch):
    mesh, optimizer, shardings, _ = compiled.__wrapped__(ONE, devices=1)
    monkeypatch.setattr(target, "platform", lambda: platform)
    model = dataclasses.replace(MODEL.config, attention="xla")
    with jax.set_mesh(mesh):
        arrays = state.abstract_state(MODEL, optimizer, shardings)
        options = {"objective": config.Flow(), "optim": OPTIM}
        run = step.compile_train_step(dip.from_config(model), optimizer, shardings, mesh, **options)
        text = run.lower(arrays, random_batch(0), jax.random.key(0)).as_text()
    assert ("stablehlo.case" in text) == (platform == "cpu")


@pytest.mark.parametrize("bad", [False, True])
def test_a_tpu_s_step_is_the_same_step(bad, monkeypatch):
    """There it selects between the states, makes the parts of fused products apart, and lays kernels out otherwise."""
    mesh, optimizer, shardings, run = compiled.__wrapped__(ONE, devices=1)
    key = jax.random.key(0)
    with jax.set_mesh(mesh):
        before = state.init_sharded(MODEL, optimizer, 0, shardings)
        if bad:
            before = before.replace(params=jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), before.params))
        kept = jax.device_get(before)
        expected, told = jax.device_get(run(before, random_batch(0), key))
        monkeypatch.setattr(target, "platform", lambda: "tpu")
        arrays = state.abstract_state(MODEL, optimizer, shardings)
        formats = state.formats(arrays)
        theirs = step.compile_train_step(MODEL, optimizer, formats, mesh, objective=config.Flow(), optim=OPTIM)
        assert "case(" not in theirs.lower(arrays, random_batch(0), key).as_text().replace("stablehlo.", "")
        found, said = theirs(jax.device_put(kept, formats), random_batch(0), key)
        turned = [a for a in jax.tree.leaves(found) if a.format.layout.major_to_minor == (0, 2, 1, 3)]
        assert {a.shape[-2] for a in turned} == {2, 3, 6} and len(turned) == 4 * 3  # weights, two moments, average
        read = jax.device_get(found)
        theirs(found, random_batch(1), key)  # what it returns it takes
    assert float(said["skipped"]) == float(told["skipped"]) == bad
    if bad:
        jax.tree.map(np.testing.assert_array_equal, read.replace(step=kept.step), kept)
        return
    np.testing.assert_allclose([float(said[name]) for name in told], [float(told[name]) for name in told], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(read.opt_state), jax.tree.leaves(expected.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-8))


def test_same_step_same_noise_next_step_other_noise():
    _, first = train(ONE, 3, devices=1)
    _, again = train(ONE, 3, devices=1)
    assert first == again
    frozen = dataclasses.replace(OPTIM, learning_rate=1e-30)
    mesh, optimizer, shardings, run = compiled(ONE, frozen, 1)
    with jax.set_mesh(mesh):
        current = state.init_sharded(MODEL, optimizer, 0, shardings)
        current, one = run(current, random_batch(0), jax.random.key(0))
        current, two = run(current, random_batch(0), jax.random.key(0))
    assert float(one["loss"]) != float(two["loss"])


def test_micro_batches_give_the_same_step():
    _, whole = train(ONE, 3, devices=1)
    _, parts = train(ONE, 3, optim=dataclasses.replace(OPTIM, accumulate=4), devices=1)
    np.testing.assert_allclose([m["loss"] for m in parts], [m["loss"] for m in whole], rtol=1e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in parts], [m["grad_norm"] for m in whole], rtol=1e-4)


@pytest.mark.parametrize(
    "sizes",
    [config.Mesh(data=8), config.Mesh(data=1, fsdp=8), config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=8, zero1=True)],
    ids=["data", "fsdp", "mixed", "zero1"],
)
def test_the_mesh_does_not_change_the_run(sizes):
    alone, losses = train(ONE, 3, devices=1)
    spread, others = train(sizes, 3)
    np.testing.assert_allclose([m["loss"] for m in others], [m["loss"] for m in losses], rtol=1e-5)
    # On average: where a gradient is all rounding, Adam turns it into a whole step.
    for a, b in zip(jax.tree.leaves(spread.ema), jax.tree.leaves(alone.ema), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).mean() < 1e-4


def test_parameters_are_born_sharded_and_equal_on_every_mesh():
    mesh, optimizer, shardings, _ = compiled(config.Mesh(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        spread = state.init_sharded(MODEL, optimizer, 0, shardings)
    split = [a for a in jax.tree.leaves(spread.params) if not a.sharding.is_fully_replicated]
    assert sum(a.size for a in split) > 0.5 * sum(a.size for a in jax.tree.leaves(spread.params))
    alone, _ = train(ONE, 0, devices=1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread.params), jax.device_get(alone.params))


def test_zero1_splits_the_average_but_not_the_parameters():
    _, _, shardings, _ = compiled(config.Mesh(data=8, zero1=True))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings.params))
    assert not all(s.is_fully_replicated for s in jax.tree.leaves(shardings.ema))


def test_no_second_compilation():
    mesh, optimizer, shardings, run = compiled(ONE, OPTIM, 1)
    train(ONE, 4, devices=1)
    assert run._cache_size() == 1
