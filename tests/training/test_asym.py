"""Rank-asymmetric prediction: its formula, what it is at both ends, how its subspace is found, kept and read again."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import options_cases as case
import pytest
import small_training
from etils import epath
from faults import harness
from small_models import randomise, small

from dip_jax import config, flow
from dip_jax.checkpoints import checkpoint
from dip_jax.config import Flow, Model
from dip_jax.data import prepared
from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.models import asym, cost
from dip_jax.sampling import trajectories
from dip_jax.training import optim, state, step

SIZE = 3 * 8**2


def orthonormal(rank: int, size: int = SIZE) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0][:, :rank].astype(np.float32)


def with_basis(params, basis):
    return {**params, asym.SUBSPACE: jnp.asarray(basis)} if asym.SUBSPACE in params else params


def inputs(model, count=3):
    keys = jax.random.split(jax.random.key(3), 2)
    x = jax.random.normal(keys[0], (count, *model.config.image_size, 3))
    return x, jnp.array([0.1, 0.5, 0.97])[:count], jnp.arange(count, dtype=jnp.int32)


@pytest.mark.parametrize("t", [0.3, 0.98])  # the second one beyond the floor
def test_the_velocity_is_its_formula_in_float64(t):
    rng, rank, clip = np.random.default_rng(1), 5, 0.05
    said, x_t = rng.standard_normal((2, 2, 6, 4, 4, 3)).astype(np.float32)
    basis = orthonormal(rank, 48)
    times = jnp.full(2, t, jnp.float32)
    found = jax.jit(lambda *a: asym.to_image(*a, t_clip=clip))(said, x_t, times, basis)
    pair = (a.reshape(2, 6, 16, 3) for a in (found, jnp.asarray(x_t)))
    as_velocity = flow.to_velocity(*pair, times, model=Model(prediction="asym"))
    s, z, a = (array.astype(np.float64).reshape(*array.shape[:2], -1) for array in (said, x_t, basis[None]))
    p = a[0] @ a[0].T
    m = max(1 - float(times[0]), clip)
    expected = s @ p + (s - z) @ (np.eye(48) - p) / m
    error = np.abs(np.asarray(as_velocity, np.float64).reshape(expected.shape) - expected).max()
    assert error <= 1e-6 * np.abs(expected).max()


def test_the_velocity_is_that_of_the_authors_code():
    """1e-5; recorded by benchmarks/options_golden.py."""
    arrays = {name: jnp.asarray(array) for name, array in case.asym().items()}
    said, x_t = (arrays[name].reshape(2, case.PATCHES, case.PATCH, case.PATCH, 3) for name in ("said", "x_t"))
    image = asym.to_image(said, x_t, arrays["t"], arrays["basis"], t_clip=1e-6)
    found = (image - x_t) / (1 - arrays["t"])[:, None, None, None, None]
    np.testing.assert_allclose(found.reshape(2, case.PATCHES, -1), case.answers()["asym/velocity"], rtol=0, atol=1e-5)


def test_a_network_that_says_what_is_asked_gives_the_velocity():
    """Equation (1) into (2): s = x - P eps gives x - eps."""
    rng, basis = np.random.default_rng(2), orthonormal(5, 48)
    x, eps = rng.standard_normal((2, 2, 6, 4, 4, 3)).astype(np.float32)
    t = jnp.array([0.2, 0.8])
    x_t = t[:, None, None, None, None] * x + (1 - t)[:, None, None, None, None] * eps
    said = x - (eps.reshape(2, 6, -1) @ basis @ basis.T).reshape(x.shape)
    image = asym.to_image(jnp.asarray(said), x_t, t, jnp.asarray(basis), t_clip=0.05)
    v = (image - x_t) / (1 - t)[:, None, None, None, None]
    np.testing.assert_allclose(v, x - eps, atol=2e-5)


@pytest.mark.parametrize(("rank", "same", "tolerance"), [(0, "x", 0), (SIZE, "v", 1e-4)])
def test_rank_0_is_x_and_full_rank_is_v(rank, same, tolerance):
    """Velocity, loss and samples of the same weights; with rank 0 to the bit, else to rounding, of which 1 / m makes more."""
    plain, ranked = small(prediction=same), small(prediction="asym", subspace_rank=rank)
    params = randomise(jax.jit(plain.init)(jax.random.key(0)))
    own = params | ({asym.SUBSPACE: jnp.asarray(orthonormal(rank))} if rank else {})
    assert jax.tree.structure(jax.eval_shape(ranked.init, jax.random.key(0))) == jax.tree.structure(own)
    x, t, y = inputs(plain)

    def both(model, weights):
        said = flow.to_velocity(model.apply(weights, x, t, y), x, t, model=model.config)
        batch = flow.corrupt(jax.random.key(5), x, y, flow=Flow(), model=model.config)
        return said, flow.loss(lambda *a: model.apply(weights, *a), batch, model=model.config)

    (v, loss), (v_ranked, loss_ranked) = (jax.jit(both, static_argnums=0)(*pair) for pair in ((plain, params), (ranked, own)))
    scale = float(jnp.abs(v).max())
    assert float(jnp.abs(v - v_ranked).max()) <= tolerance * scale
    assert float(loss_ranked) == pytest.approx(float(loss), rel=tolerance, abs=0)
    options = config.Sample(steps=3, solver="heun", batch_size=3, guidance=2.0)
    images = [
        next(trajectories.draw_batches(model, weights, labels=[0, 1, 2], seed=0, options=options))[1].astype(int)
        for model, weights in ((plain, params), (ranked, own))
    ]
    assert np.abs(images[0] - images[1]).max() <= (tolerance > 0)


@pytest.mark.parametrize(
    ("head", "placement"), [("unet", "post_hoc"), ("mlp", "hybrid"), ("attention", "intermediate"), ("none", "post_hoc")]
)
def test_the_conversion_follows_every_head_and_placement(head, placement):
    """With A = 0 the output is that of x; with another A it differs by what equation (3) adds."""
    model = small(head=head, placement=placement, prediction="asym", subspace_rank=4)
    params = randomise(jax.jit(model.init)(jax.random.key(0)))
    apply, args = jax.jit(model.apply), inputs(model)
    plain = apply({**params, asym.SUBSPACE: jnp.zeros((SIZE, 4))}, *args)
    x_model = small(head=head, placement=placement, prediction="x")
    np.testing.assert_array_equal(plain, jax.jit(x_model.apply)({k: v for k, v in params.items() if k != asym.SUBSPACE}, *args))
    assert float(jnp.abs(apply(with_basis(params, orthonormal(4)), *args) - plain).max()) > 1e-3


def test_the_subspace_is_the_leading_one_of_the_uncentred_patches():
    rng = np.random.default_rng(4)
    images = [rng.integers(0, 256, (16, 8, 3), dtype=np.uint8) for _ in range(5)]
    basis = asym.find_subspace(images, patch_size=4, rank=3)
    patches = np.stack(
        [image[r : r + 4, c : c + 4].ravel() / 127.5 - 1 for image in images for r in range(0, 16, 4) for c in (0, 4)]
    )
    singular = np.linalg.svd(patches)[2][:3].T
    np.testing.assert_allclose(np.abs((basis * singular).sum(0)), 1, atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-6)
    assert (np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0) > 0).all()


def test_neither_decay_nor_average_moves_the_subspace_and_no_gradient_reaches_it():
    model = small(prediction="asym", subspace_rank=4)
    options = config.Optim(learning_rate=1e-2, weight_decay=0.5, ema_decays=(0.9,))
    made, basis = optim.make_optimizer(options, total_steps=10), orthonormal(4)
    now = jax.jit(lambda key: state.create_state(model, made, key))(jax.random.key(0))
    now = now.replace(params=with_basis(now.params, basis), emas=(with_basis(now.ema, basis),))
    image = np.random.default_rng(0).integers(0, 256, (4, *model.config.image_size, 3), dtype=np.uint8)
    batch = {"image": image, "label": np.arange(4, dtype=np.int32)}
    batch = jax.tree.map(jnp.asarray, batch)

    @jax.jit
    def advance(current):
        return step.train_step(current, batch, jax.random.key(1), model=model, optimizer=made, objective=Flow(), optim=options)

    after, metrics = advance(advance(now)[0])
    for tree in (after.params, after.ema):
        np.testing.assert_array_equal(tree[asym.SUBSPACE], basis)
    assert (
        metrics["skipped"] == 0
        and (after.params["condition"]["label"]["table"] != now.params["condition"]["label"]["table"]).any()
    )
    moments = jax.tree_util.tree_leaves_with_path(after.opt_state)
    moments = [leaf for path, leaf in moments if asym.SUBSPACE in jax.tree_util.keystr(path)]
    assert len(moments) == 2 and not any(leaf.any() for leaf in moments)


@pytest.mark.parametrize("mesh", [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=8, zero1=True)])
def test_training_is_the_same_on_every_mesh(mesh):
    def start(fresh):
        return fresh.replace(params=with_basis(fresh.params, orthonormal(4)), emas=(with_basis(fresh.ema, orthonormal(4)),))

    fields = {"prediction": "asym", "subspace_rank": 4}
    (one, first), (many, other) = (small_training.run(fields, 2, start=start, mesh=each) for each in (None, mesh))
    for a, b in zip(first, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
    for run in (one, many):
        np.testing.assert_array_equal(run.params[asym.SUBSPACE], orthonormal(4))
        np.testing.assert_array_equal(run.ema[asym.SUBSPACE], orthonormal(4))


def ranked_config(dataset, **changes):
    run = harness.tiny_config(dataset, **changes)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, prediction="asym", subspace_rank=3))


def test_a_run_finds_its_subspace_once_keeps_it_and_goes_on_with_it(dataset, tmp_path):
    run = ranked_config(dataset, train__steps=2)
    whole = tmp_path / "whole"
    train.train(run, workdir=whole)
    images = prepared.open_dataset(dataset, image_size=run.model.image_size[0])
    expected = asym.find_subspace((images[i]["image"] for i in range(len(images))), patch_size=run.model.patch_size, rank=3)
    loaded = {weights: checkpoint.load(whole, weights=weights)[1] for weights in ("ema", "raw", "initial")}
    for params in loaded.values():
        np.testing.assert_allclose(params[asym.SUBSPACE], expected, atol=1e-6)
    record = checkpoint.read_record(epath.Path(whole / "checkpoints" / "2"))
    assert record.data["subspace"] == hashlib.sha256(np.asarray(loaded["ema"][asym.SUBSPACE])).hexdigest()
    parts = tmp_path / "parts"
    train.train(ranked_config(dataset, train__steps=1), workdir=parts)
    for file in parts.glob("subspace_*.npy"):
        file.unlink()
    train.train(run, workdir=parts)
    assert not list(parts.glob("subspace_*.npy"))  # going on needs none
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(parts, weights="raw")[1], loaded["raw"])


def test_a_run_that_starts_from_another_takes_its_subspace(dataset, tmp_path):
    train.train(ranked_config(dataset, train__steps=1), workdir=tmp_path / "old")
    run = ranked_config(dataset, train__steps=1)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, init_from=str(tmp_path / "old")))
    train.train(run, workdir=tmp_path / "new")
    assert not list((tmp_path / "new").glob("subspace_*.npy"))
    old, new = (checkpoint.load(tmp_path / name)[1][asym.SUBSPACE] for name in ("old", "new"))
    np.testing.assert_array_equal(old, new)


def test_the_second_output_is_converted_too():
    model = small(prediction="asym", subspace_rank=4, internal=True)
    params = randomise(jax.jit(model.init)(jax.random.key(0)))
    args, apply = inputs(model), jax.jit(model.apply_all)
    found = [
        apply({**params, asym.SUBSPACE: jnp.asarray(basis)}, *args)
        for basis in (orthonormal(4), np.zeros((SIZE, 4), np.float32))
    ]
    for name in ("prediction", "internal"):
        assert float(jnp.abs(getattr(found[0], name) - getattr(found[1], name)).max()) > 1e-3


def test_what_it_costs_and_what_is_refused():
    plain, ranked = Model(prediction="x"), Model(prediction="asym")
    counted = cost.forward_flops(ranked)
    assert counted.pop("subspace") == 2 * 2 * 256 * 768 * 8
    assert counted | {"subspace": 0} == cost.forward_flops(plain)
    with pytest.raises(UserError, match=r"model.subspace_rank=769 must lie in 0..768"):
        Model(prediction="asym", subspace_rank=769)
