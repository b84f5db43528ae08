"""Weights from another model: of other classes, resolution or patch size."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import ROOT
from small_models import COMBINATIONS, small

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import dip, starting


def weights(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), shapes)


def begin(old, new, *, classes=((), ())):
    params = weights(old)
    origin = starting.Origin(old.config, params, classes[0])
    started, said = starting.begin(weights(new, 1), origin, model=new.config, classes=classes[1])
    return params, started, said


def answer(model, params, x, y):
    return np.asarray(jax.jit(model.apply)(params, x, jnp.full(len(x), 0.4), jnp.asarray(y, jnp.int32)))


@pytest.mark.parametrize(
    ("old", "new", "rows", "words"),
    [
        ((), (), (0, 1, 2, 3, 4), ""),
        (("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e"), (0, 1, 2, 3, 4), ""),
        (
            ("a", "b", "c", "d", "e"),
            ("e", "x", "a"),
            (4, 5, 0),
            "2 of 3 classes by name, 1 new (as the null class), 3 left out",
        ),
        (("a", "b", "c", "d", "e"), ("u", "v"), (0, 1), "2 of 2 classes by number, 0 new (as the null class), 3 left out"),
        ((), ("u",) * 7, (0, 1, 2, 3, 4, 5, 5), "5 of 7 classes by number, 2 new (as the null class), 0 left out"),
        (("a", "a", "c", "d", "e"), ("a",), (0,), "1 of 1 classes by name, 0 new (as the null class), 4 left out"),
        (("too", "few"), ("too", "few", "f"), (0, 1, 2), "3 of 3 classes by number, 0 new (as the null class), 2 left out"),
    ],
)
def test_classes_are_matched_by_name_or_number(old, new, rows, words):
    assert starting.match_classes(old, new, before=5, now=len(new) or 5) == starting.Rows(rows, words)


def test_another_number_of_classes_draws_the_same_for_shared_ones_and_for_none():
    old, new = small(), small(num_classes=7)
    params, started, said = begin(old, new)
    x = jax.random.normal(jax.random.key(2), (3, 16, 8, 3))
    np.testing.assert_array_equal(answer(new, started, x, [0, 4, 7]), answer(old, params, x, [0, 4, 5]))
    np.testing.assert_array_equal(answer(new, started, x, [5, 6, 7]), answer(old, params, x, [5, 5, 5]))
    assert said == "the backbone and the head; 5 of 7 classes by number, 2 new (as the null class), 0 left out"
    names = (("a", "b", "c", "d", "e"), ("e", "z", "a", "b", "c", "d", "y"))
    params, started, _ = begin(old, new, classes=names)
    np.testing.assert_array_equal(answer(new, started, x, [0, 2, 1]), answer(old, params, x, [4, 0, 5]))


@pytest.mark.parametrize("placement", ["post_hoc", "intermediate"])
@pytest.mark.parametrize("position", ["rope", "rope+sincos"])
def test_another_resolution_needs_no_new_weights(placement, position):
    old, new = (small(placement=placement, position=position, image_size=size) for size in ((16, 8), (32, 24)))
    params, started, said = begin(old, new)
    jax.tree.map(np.testing.assert_array_equal, started, params)
    assert said == "the backbone and the head; images of 32 x 24, were 16 x 8"


@pytest.mark.parametrize("factor", [2, 1 / 2])
def test_a_dit_of_another_patch_size_says_the_same_of_the_same_picture(factor):
    """Enlarged by repeating pixels the input shrinks to itself, so the answer is the old one, enlarged (or shrunk)."""
    size, patch = (16, 8), 8
    old = small(head="none", image_size=size, patch_size=patch)
    new = small(head="none", image_size=tuple(int(s * factor) for s in size), patch_size=int(patch * factor))
    params, started, said = begin(old, new)
    sizes = "{} x {}".format(*new.config.image_size)
    assert said == f"the backbone; patches of 8 resized to {new.config.patch_size}; images of {sizes}, were 16 x 8"
    coarse = np.asarray(jax.random.normal(jax.random.key(2), (2, 8, 4, 3)))  # the same picture in both
    x_old, x_new = (coarse.repeat(s // 8, 1).repeat(s // 8, 2) for s in (16, new.config.image_size[0]))
    said_old, said_new = answer(old, params, x_old, [0, 5]), answer(new, started, x_new, [0, 5])
    side, enlarge = new.config.patch_size, starting.enlarging(8, new.config.patch_size)
    patches = said_old.reshape(2, 2, 8, 1, 8, 3)
    expected = np.einsum("ai,bj,nricjk->nracbk", enlarge, enlarge, patches).reshape(2, 2 * side, side, 3)
    np.testing.assert_allclose(said_new, expected, atol=2e-5)


def test_the_maps_keep_what_is_flat_and_undo_each_other():
    for old, new in ((16, 32), (32, 16), (8, 12), (16, 16)):
        for matrix in (starting.shrinking(old, new), starting.enlarging(old, new)):
            assert matrix.shape == (new, old)
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(starting.shrinking(16, 16), np.eye(16))
    np.testing.assert_allclose(starting.enlarging(16, 16), np.eye(16))
    ramp = np.arange(8.0)
    np.testing.assert_allclose((starting.shrinking(16, 8) @ starting.enlarging(8, 16) @ ramp)[1:-1], ramp[1:-1], atol=1e-6)


@pytest.mark.parametrize(("head", "placement"), COMBINATIONS)
def test_a_head_carries_over_where_it_is_the_same(head, placement):
    old = small(head=head, placement=placement)
    new = small(head=head, placement=placement, image_size=(32, 16), patch_size=16)
    params, started, said = begin(old, new)
    shapes, needed = (jax.tree.map(jnp.shape, tree) for tree in (params, jax.eval_shape(new.init, jax.random.key(0))))
    heads = [name for name in ("head", "inject_head") if name in params]
    fits = bool(heads) and all(shapes[name] == needed[name] for name in heads)
    kept = fits and old.config.head_depth == new.config.head_depth
    if head in ("none", "mlp", "attention", "coord_mlp", "unet"):
        assert fits == (head in ("unet", "coord_mlp"))
    assert jax.tree.map(jnp.shape, started) == needed
    for name in [name for name in ("head", "inject_head") if name in params]:
        equal = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (started[name], params[name])), strict=False)]
        assert all(equal) == kept
    assert ("a new head" in said) == (not kept and head != "none")
    if "inject" in params and not kept:
        np.testing.assert_array_equal(started["inject"]["kernel"], weights(new, 1)["inject"]["kernel"])


def test_a_head_that_computes_otherwise_is_new():
    _, _, said = begin(small(head_pool="avg"), small(head_pool="max"))
    assert said == "the backbone; a new head"


def test_what_the_same_weights_mean_otherwise_is_said():
    _, _, said = begin(small(prediction="v", position="rope"), small(prediction="x", position="rope+sincos"))
    assert said == "the backbone and the head; prediction x, was v; position rope+sincos, was rope"


def test_another_width_is_refused():
    with pytest.raises(UserError, match="do not fit this model: condition"):
        begin(small(), small(width=64))


@pytest.mark.parametrize("name", ["demo", "released"])
def test_the_second_part_of_a_config_goes_on_with_all_that_the_first_learnt(name):
    """All but the head, which begins at zero: the first prediction is the DiT's."""
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    first, second = (dip.from_config(config.from_config_dict(get_config(part)).model) for part in ("dit", ""))
    params, started, said = begin(first, second)
    assert said == "the backbone; a new head" and set(started) - set(params) == {"head"}
    for part in params:
        jax.tree.map(np.testing.assert_array_equal, started[part], params[part])
    fresh = jax.jit(second.init)(jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((2, *first.config.image_size, 3)).astype(np.float32)
    begun = {**started, "head": fresh["head"]}
    np.testing.assert_allclose(answer(second, begun, x, [0, 9]), answer(first, params, x, [0, 9]), rtol=0.05, atol=0.05)
