"""A weaker model guides in the place of the unconditional half: its formula, when it runs, what it must share, and off."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import randomise, small

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint
from dip_jax.errors import UserError
from dip_jax.sampling import trajectories
from dip_jax.sampling.guidance import Guide
from dip_jax.sampling.trajectories import Weaker, draw_batches

OPTIONS = config.Sample(steps=3, guidance=1.7, interval=(0.2, 0.9), batch_size=4)
LABELS = [0, 1, 2, 3]


def weights(model, seed):
    return randomise(jax.jit(model.init)(jax.random.key(seed)), seed)


def draw(model, params, options=OPTIONS, **more):
    return np.concatenate([images for _, images in draw_batches(model, params, labels=LABELS, seed=1, options=options, **more)])


def test_the_formula_in_float64():
    """Karras et al. 2024: D = D_g + w (D_c - D_g), of denoised images D = x + (1 - t) v."""
    rng = np.random.default_rng(0)
    x, own, other = rng.normal(size=(3, 4, 8, 8, 3)).astype(np.float32)
    t, w = rng.uniform(0.05, 0.9, 4).astype(np.float32), 2.3
    guide = Guide(lambda *_: jnp.asarray(own), jnp.zeros(4, jnp.int32), w, 9, None, lambda *_: jnp.asarray(other))
    found = np.asarray(guide.velocity(jnp.asarray(x), jnp.asarray(t), (None, None), guided=True), np.float64)
    left = 1 - t.astype(np.float64)[:, None, None, None]
    denoised, weak = (x.astype(np.float64) + left * v.astype(np.float64) for v in (own, other))
    expected = (weak + w * (denoised - weak) - x) / left
    assert np.abs(found - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
    assert np.array_equal(guide.velocity(jnp.asarray(x), jnp.asarray(t), (None, None), guided=False), own)


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_a_guide_of_any_size_is_combined_inside_the_interval(prediction):
    """By hand, a step at a time, with a guide of another depth, width, head and kind of prediction."""
    model, smaller = small(), small(depth=1, width=16, head="none", prediction=prediction)
    params, weak = weights(model, 1), weights(smaller, 2)
    options = config.Sample(steps=3, guidance=1.7, interval=(0.2, 0.9), batch_size=4)
    found = draw(model, params, options, guide=Weaker(smaller, weak))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(4))
    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (16, 8, 3)))(keys)
    y = jnp.array(LABELS)
    for k in range(3):
        t = jnp.full(4, np.float32(k / 3))
        v = model.apply(params, x, t, y)
        if 0.2 < k / 3 < 0.9:
            other = smaller.apply(weak, x, t, y)
            floor = min(smaller.config.t_clip, 1 / 3)
            other = (other - x) / jnp.maximum(1 - t, floor)[:, None, None, None] if prediction == "x" else other
            v = other + 1.7 * (v - other)
        x = x + v / 3
    expected = np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255)
    assert np.abs(found.astype(int) - expected).max() <= 1 and (found == expected).mean() > 0.99


def test_internal_guidance_is_the_models_own_and_not_the_guides():
    """Both at once, by hand: the guide has no second output and is taken as it is."""
    model, smaller = small(internal=True), small(depth=1, width=16, head="none")
    params, weak = weights(model, 1), weights(smaller, 2)
    options = config.Sample(steps=2, guidance=1.7, interval=(0.2, 0.9), internal_guidance=1.4, batch_size=4)
    found = draw(model, params, options, guide=Weaker(smaller, weak))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(4))
    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (16, 8, 3)))(keys)
    for t in (0.0, 0.5):
        inputs = (x, jnp.full(4, np.float32(t)), jnp.array(LABELS))
        said = model.apply_all(params, *inputs)
        v = said.internal + 1.4 * (said.prediction - said.internal)
        if t:
            other = smaller.apply(weak, *inputs)
            v = other + 1.7 * (v - other)
        x = x + v / 2
    expected = np.clip(np.round((np.asarray(x) + 1) * 127.5), 0, 255)
    assert np.abs(found.astype(int) - expected).max() <= 1 and (found == expected).mean() > 0.99


def test_itself_as_guide_changes_nothing_and_a_weaker_one_does():
    model = small()
    params = weights(model, 1)
    plain = draw(model, params, config.Sample(steps=3, guidance=1.0, batch_size=4))
    same = draw(model, params, guide=Weaker(model, params))
    assert np.abs(plain.astype(int) - same).max() <= 1
    assert np.abs(plain.astype(int) - draw(model, params, guide=Weaker(model, weights(model, 2)))).max() > 1
    unused = draw(model, params, config.Sample(steps=3, guidance=1.0, batch_size=4), guide=Weaker(model, weights(model, 2)))
    assert np.abs(plain.astype(int) - unused).max() == 0  # guidance 1 is none


def test_off_is_the_program_without_it():
    model = small()
    arguments = [weights(model, 1), np.float32(2), np.uint32(1), jnp.arange(4), jnp.array(LABELS)]
    lower = trajectories._draw.lower
    with jax.set_mesh(trajectories.sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        without = lower(*arguments, model=model, options=OPTIONS).as_text()
        off = lower(*arguments, model=model, options=OPTIONS, weaker=None, guide=None).as_text()
        on = lower(*arguments, model=model, options=OPTIONS, weaker=arguments[0], guide=model).as_text()
    assert without == off != on


def test_another_mesh_draws_the_same():
    model, smaller = small(), small(depth=1, width=16)
    params, guide = weights(model, 1), Weaker(smaller, weights(smaller, 2))
    meshes = [trajectories.sharding.make_mesh(config.Mesh(), jax.devices()[:count]) for count in (1, 4)]
    one, four = (draw(model, params, guide=guide, mesh=mesh) for mesh in meshes)
    assert np.abs(one.astype(int) - four).max() <= 1


@pytest.mark.parametrize(
    "changed, said", [({"num_classes": 6}, "6 classes, the model 5"), ({"image_size": (8, 8)}, "8x8 pixels")]
)
def test_other_classes_and_sizes_are_refused_in_one_line(changed, said):
    model, other = small(), small(**changed)
    with pytest.raises(UserError, match=said):
        draw(model, {}, guide=Weaker(other, {}))


def test_the_command(tmp_path, capsys):
    for name, width, classes in (("big", 32, 5), ("small", 16, 5), ("other", 16, 4)):
        model = small(width=width, num_classes=classes, head="none")
        run = config.Config(model=model.config, sample=OPTIONS)
        checkpoint.write_weights(tmp_path / name, weights(model, width), config=run)
    base = ["sample", f"--workdir={tmp_path / 'big'}", "--num_samples=4"]
    for name, flags in {"plain": [], "guided": [f"--guide={tmp_path / 'small'}"]}.items():
        assert main([*base, f"--out={tmp_path / name}.npz", *flags]) == 0
    plain, guided = (json.loads((tmp_path / f"{name}.npz.json").read_text()) for name in ("plain", "guided"))
    assert guided["nfe"] == {"conditional": 3, "guide": 2} and "guide" not in plain
    assert guided["guide"]["model"]["width"] == 16 and plain["nfe"] == {"conditional": 3, "unconditional": 2}
    with np.load(tmp_path / "plain.npz") as a, np.load(tmp_path / "guided.npz") as b:
        assert not np.array_equal(a["arr_0"], b["arr_0"])
    capsys.readouterr()
    assert main([*base, f"--out={tmp_path / 'plain.npz'}", f"--guide={tmp_path / 'small'}"]) == 2
    assert main([*base, f"--out={tmp_path / 'no.npz'}", f"--guide={tmp_path / 'other'}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "begun with other settings (guide" in lines[-2] and "the guide has 4 classes, the model 5" in lines[-1]
