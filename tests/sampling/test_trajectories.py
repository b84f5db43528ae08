"""A real (tiny) model, compiled: the same samples from any batch size and any devices, compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.jobs.sample import sample
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.sampling import sampler, trajectories

LABELS = [0, 1, 2, 3, 0, 1, 2]
OPTIONS = config.Sample(steps=3, guidance=1.0, batch_size=4)
GUIDED = config.Sample(steps=3, guidance=3.0, interval=(0.2, 1.0), batch_size=7)


@functools.cache
def model_and_params(dtype="float32"):
    model = dip.build("DiT-tiny/8", image_size=16, num_classes=4, depth=1, width=24, num_heads=2, dtype=dtype, inject_after=1)
    key = jax.random.key(1)
    params = jax.jit(lambda: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), model.init(key)))()
    return model, params


def one_device():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def draw(mesh=None, labels=LABELS, seed=0, options=OPTIONS, dtype="float32", **changes):
    batches = trajectories.draw_batches(
        *model_and_params(dtype), labels=labels, seed=seed, options=options, mesh=mesh or one_device(), **changes
    )
    return np.concatenate([images for _, images in batches])


def agree(a, b):
    """One level in fewer than 0.1 % of the pixels."""
    difference = np.abs(a.astype(int) - b)
    return difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_any_batch_size_gives_the_same_images():
    expected = draw()
    assert expected.shape == (7, 16, 16, 3) and expected.dtype == np.uint8 and expected.std() > 20
    assert agree(draw(options=dataclasses.replace(OPTIONS, batch_size=7)), expected)


@pytest.mark.parametrize(
    ("sizes", "solver"), [(config.Mesh(), "sde"), (config.Mesh(), "euler"), (config.Mesh(data=2, fsdp=2, tensor=2), "euler")]
)
def test_one_device_and_eight_give_the_same_images(sizes, solver):
    options = dataclasses.replace(GUIDED, solver=solver)
    assert agree(draw(mesh=sharding.make_mesh(sizes), options=options), draw(options=options))


def test_a_second_call_compiles_nothing(monkeypatch):
    traced = []
    monkeypatch.setattr(trajectories.flow, "to_velocity", lambda v, x_t, t, model: traced.append(x_t.shape) or v)
    trajectories._draw.clear_cache()
    draw(options=GUIDED, labels=LABELS * 2 + [3])
    first = list(traced)
    assert [shape[0] for shape in first] == [7, 14]  # once outside the interval, once inside; the short batch is padded
    drawn = draw(options=GUIDED, seed=3, labels=LABELS)
    stronger = draw(options=dataclasses.replace(GUIDED, guidance=GUIDED.guidance + 1), seed=3, labels=LABELS)
    assert traced == first and not agree(drawn, stronger)
    draw(options=dataclasses.replace(GUIDED, guidance=1.0), seed=3, labels=LABELS)
    assert [shape[0] for shape in traced[len(first) :]] == [7]  # never guided: another program, half the work
    monkeypatch.undo()
    trajectories._draw.clear_cache()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_modulations_ahead_change_nothing_and_are_left_out_where_they_do_not_fit(solver, monkeypatch):
    options = dataclasses.replace(GUIDED, solver=solver, steps=6)
    made = []
    real = dip.DiP.modulations
    monkeypatch.setattr(dip.DiP, "modulations", lambda *args: made.append(args[2].shape) or real(*args))
    drawn = {}
    one = 4 * (24 + 6 * 24 + 2 * 24)  # bytes of one time with one label: t_emb, a block, the final layer
    needed = one * sampler.nfe(options)[0] * (len(LABELS) + 1)
    for limit in (needed - 1, needed):
        monkeypatch.setattr(trajectories, "AHEAD_BYTES", limit)
        trajectories._draw.clear_cache()
        made.clear()
        drawn[limit] = draw(options=options)
        assert len(made) == (1 if limit < needed else {"euler": 4, "heun": 5}[solver])  # one only asks how large they are
    trajectories._draw.clear_cache()
    assert agree(*drawn.values())


def test_seed_and_label_matter_and_the_rest_does_not():
    expected = draw()
    assert not agree(draw(seed=1), expected)
    moved = draw(labels=[1, *LABELS[1:]])
    assert not agree(moved[:1], expected[:1]) and agree(moved[1:], expected[1:])


def test_chosen_batches():
    drawn = dict(
        trajectories.draw_batches(*model_and_params(), labels=LABELS, seed=0, options=OPTIONS, mesh=one_device(), only=[1])
    )
    assert list(drawn) == [1] and agree(drawn[1], draw()[4:])


def test_frames_end_where_the_samples_do():
    way = trajectories.draw_frames(
        *model_and_params(), labels=[0, 1, 2, 3], seed=0, options=OPTIONS, mesh=sharding.make_mesh(config.Mesh()), frames=2
    )
    assert way.noisy.shape == way.expected.shape == (2, 4, 16, 16, 3)
    assert way.times.tolist() == pytest.approx([0, 2 / 3])
    assert agree(way.images, draw()[:4])


def test_public_function():
    images = sample(*model_and_params(), labels=[0, 4, 2, 3], steps=3, guidance=1.0, batch_size=4)
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.uint8  # 4 is no class: unconditional
    assert agree(images[[0, 2, 3]], draw()[[0, 2, 3]])


def test_prediction_type_is_honoured():
    """The same network read as an x prediction moves elsewhere: v = (x_hat - x_t) / (1 - t)."""
    model, params = model_and_params()
    options = config.Sample(steps=1, guidance=1.0, batch_size=2)
    x = sampler.draw(
        lambda x_t, t, y: model.apply(params, x_t, t, y) - x_t,
        key=jax.random.key(0),
        indices=jnp.arange(2, dtype=jnp.int32),
        labels=jnp.array([0, 1], jnp.int32),
        image_shape=(16, 16, 3),
        sample=options,
        null_label=4,
    )
    saying_x = dip.from_config(dataclasses.replace(model.config, prediction="x"))
    [(_, drawn)] = trajectories.draw_batches(saying_x, params, labels=[0, 1], seed=0, options=options, mesh=one_device())
    assert agree(drawn, np.asarray(sampler.to_uint8(x)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0, 5]}, "label 5 is not a class: this model has 0..3"),
        ({"labels": [-1]}, "label -1 is not a class"),
        ({"labels": []}, "at least one class"),
        ({"labels": np.array([0.5])}, "list of at least one class number"),
        ({"seed": -1}, "seed=-1 must lie in 0"),
        ({"seed": 2**32}, "must lie in 0"),
    ],
)
def test_mistakes_are_told_before_compiling(changes, message, monkeypatch):
    monkeypatch.setattr(trajectories, "_draw", None)
    with pytest.raises(UserError, match=message):
        draw(**changes)


def test_damaged_weights_are_told():
    model, params = model_and_params()
    params = jax.tree.map(lambda p: p * jnp.nan, params)
    with pytest.raises(UserError, match="4 of 4 samples of batch 0 hold NaN"):
        list(trajectories.draw_batches(model, params, labels=LABELS, seed=0, options=OPTIONS, mesh=one_device()))


def test_bfloat16_stays_close():
    """What the README states: rounding in the network moves pixels by a few levels, not the image."""
    difference = np.abs(draw(dtype="bfloat16").astype(int) - draw())
    assert 0 < difference.mean() < 4


def test_weights_are_converted_once_and_only_for_bfloat16(monkeypatch):
    seen = []
    real = trajectories._draw
    monkeypatch.setattr(
        trajectories, "_draw", lambda params, *args, **static: seen.append(params) or real(params, *args, **static)
    )
    for dtype in ("bfloat16", "float32"):
        draw(dtype=dtype)
        kernels = [params["blocks"]["attention"]["qkv"]["kernel"] for params in seen]
        assert [kernel.dtype for kernel in kernels] == [dtype] * 2 and kernels[0] is kernels[1]  # two batches
        assert seen[0]["condition"]["time"]["in"]["kernel"].dtype == seen[0]["blocks"]["norm1"]["scale"].dtype == "float32"
        seen.clear()


@pytest.mark.parametrize("steps", [10, 50])
def test_a_sample_of_an_image_predictor_is_the_image_it_predicts(steps):
    """An untrained model predicts grey: nothing of the noise may be left, however small the last step."""
    model = dip.build(
        "DiT-tiny/8", image_size=16, num_classes=4, depth=1, width=24, num_heads=2, dtype="float32", prediction="x"
    )
    params = jax.jit(model.init)(jax.random.key(0))
    options = config.Sample(steps=steps, guidance=1.0, batch_size=2)
    (_, images), *_ = trajectories.draw_batches(model, params, labels=[0, 1], seed=0, options=options, mesh=one_device())
    assert set(np.unique(images).tolist()) <= {127, 128}
