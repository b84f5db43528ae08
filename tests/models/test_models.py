"""Contracts of every head and placement, on fully random parameters: zero-initialised outputs would hide the gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import COMBINATIONS, REAL_HEADS, assert_same, randomise, small

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import condition, folding, layers, placement, starting
from dip_jax.models.detailers import HEADS
from dip_jax.models.dip import build
from dip_jax.models.patches import patchify, unpatchify
from dip_jax.models.placement import PLACEMENTS
from dip_jax.runtime import sharding


@functools.cache
def random_params(**changed):
    return randomise(jax.jit(small(**changed).init)(jax.random.key(1)))


def batch(size=2, image_size=(16, 8)):
    x = jax.random.normal(jax.random.key(2), (size, *image_size, 3))
    return x, jnp.linspace(0.1, 0.9, size), jnp.arange(size, dtype=jnp.int32) % 6


def weighted(output):
    """A scalar in which every entry of `output` has a weight of its own."""
    return jnp.sum(output * jax.random.normal(jax.random.key(3), output.shape))


@functools.cache
def run(**changed):
    """(output, gradients) of the small model."""
    model = small(**changed)

    def value(params):
        output = model.apply(params, *batch())
        return weighted(output), output

    (_, output), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(random_params(**_structure(changed)))
    return output, gradients


def _structure(changed):
    """The fields that decide the parameters; the others must not."""
    return {key: value for key, value in changed.items() if key in ("head", "placement")}


@pytest.mark.parametrize(("head", "place"), COMBINATIONS)
def test_output_is_finite_and_gradient_reaches_every_parameter(head, place):
    output, gradients = run(head=head, placement=place)
    assert output.shape == (2, 16, 8, 3) and output.dtype == jnp.float32
    assert np.isfinite(output).all()
    assert np.std(output) > 0.01
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), name
        rows = gradient if name.startswith("['blocks") else gradient[None]  # each layer of a stack for itself
        rows = rows[..., :2, :] if name.endswith("['table']") else rows  # the labels in the batch
        assert all(np.mean(row != 0) > 0.9 for row in np.asarray(rows)), f"{name} gets no gradient"


def head_inputs(model):
    n = model.config.image_size[0] * model.config.image_size[1] // model.config.patch_size**2
    p = jax.random.normal(jax.random.key(4), (2, n, model.config.patch_size, model.config.patch_size, 3))
    s = jax.random.normal(jax.random.key(5), (2, n, model.config.width))
    return p, s, jax.random.normal(jax.random.key(6), (2, model.config.width))


@pytest.mark.parametrize("head", REAL_HEADS)
def test_mapped_head_is_the_head_of_one_patch(head):
    model = small(head=head).config
    params = {"params": random_params(head=head)["head"]}
    p, s, t_emb = head_inputs(small(head=head))
    mapped = jax.jit(placement.MappedHead(model, name="head").apply)(params, p, s, t_emb)
    one = jax.jit(HEADS[head](model).apply)
    for b, n in [(0, 0), (1, 1)]:
        np.testing.assert_allclose(one(params, p[b, n], s[b, n], t_emb[b]), mapped[b, n], atol=2e-6, rtol=1e-5)


def test_groups_of_patches_change_neither_output_nor_gradients(monkeypatch):
    model, params = small(head="unet").config, random_params(head="unet")["head"]
    inputs = head_inputs(small(head="unet"))

    def run(size):
        monkeypatch.setattr(folding, "GROUP_BYTES", size)
        apply = placement.MappedHead(model).apply
        assert folding.count_groups(model, images=len(inputs[0]), patches=inputs[0].shape[1]) == (2 if size == 1 else 1)
        return jax.value_and_grad(lambda params, *inputs: weighted(apply({"params": params}, *inputs)), (0, 1, 2))(
            params, *inputs
        )

    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):  # of a CPU: elsewhere there are no groups
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), run(1), run(2**40))


@pytest.mark.parametrize("head", REAL_HEADS)
def test_output_patch_depends_on_its_own_pixels_alone(head):
    """With a patch embedding that ignores pixels, the backbone's features are fixed; what is left is the head's own reading."""
    model, params = small(head=head), random_params(head=head)
    blind = {**params, "patch_embed": jax.tree.map(jnp.zeros_like, params["patch_embed"])}
    x, t, y = batch()

    def touched(weights):
        def patch_sum(pixels):
            return weighted(patchify(model.apply(weights, pixels, t, y), 8)[0, 1])

        return np.abs(patchify(jax.jit(jax.grad(patch_sum))(x), 8)).max((2, 3, 4)) > 0

    assert touched(blind).tolist() == [[False, getattr(HEADS[head], "reads_pixels", True)], [False, False]]
    assert touched(params).tolist() == [[True, True], [False, False]]  # the features do reach across patches


@pytest.mark.parametrize("place", PLACEMENTS)
def test_scan_is_the_loop(place):
    looped = run(head="mlp", placement=place, scan_layers=False)
    assert_same(run(head="mlp", placement=place), looped, 1e-5)


def test_unrolled_layers_leave_no_loop():
    x, t, y = batch()
    text = {
        scan: jax.jit(small(head="mlp", depth=3, scan_layers=scan).apply)
        .lower(jax.eval_shape(small(head="mlp", depth=3).init, jax.random.key(0)), x, t, y)
        .as_text()
        for scan in (True, False)
    }
    assert "stablehlo.while" in text[True]
    assert "stablehlo.while" not in text[False]


@pytest.mark.parametrize("scan", [True, False])
def test_rematerialisation_changes_memory_and_nothing_else(scan):
    kept = run(head="mlp", placement="post_hoc", scan_layers=scan)
    for remat in ("dots", "full"):
        assert_same(run(head="mlp", placement="post_hoc", scan_layers=scan, remat=remat, head_remat=True), kept, 1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_rematerialisation_is_really_on(scan):
    """The backward pass multiplies more matrices with "full" than without; the head's is fenced off from its forward pass."""

    def lowered(**changed):
        model = small(head="mlp", depth=3, scan_layers=scan, **changed)
        params = jax.eval_shape(model.init, jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda p: weighted(model.apply(p, *batch()))))
        return gradient.lower(params).as_text()

    none, dots, full = (lowered(remat=remat).count("stablehlo.dot_general") for remat in ("none", "dots", "full"))
    assert full > none
    assert none <= dots < full
    assert "optimization_barrier" not in lowered(head_remat=False)
    assert "optimization_barrier" in lowered(head_remat=True)


@pytest.mark.parametrize(("head", "place"), [*((head, "post_hoc") for head in HEADS), ("unet", "hybrid")])
def test_bfloat16_stays_close_to_float32(head, place):
    """Bound: 4 % of the output's norm."""
    exact, _ = run(head=head, placement=place)
    model = small(head=head, placement=place, dtype="bfloat16")
    rough = jax.jit(model.apply)(random_params(head=head, placement=place), *batch())
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.04


@pytest.mark.parametrize(("head", "place"), [("unet", "post_hoc"), pytest.param("attention", "hybrid", marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(head, place):
    model, params = small(head=head, placement=place), random_params(head=head, placement=place)
    x, t, y = batch(8)

    def value(params, x, t, y):
        return weighted(model.apply(params, x, t, y))

    alone = jax.jit(jax.value_and_grad(value))(params, x, t, y)
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(mesh, model.logical_axes(), params))
        axes = tuple(("batch",) + (None,) * (a.ndim - 1) for a in (x, t, y))
        split = jax.device_put((x, t, y), sharding.shardings(mesh, axes, (x, t, y)))
        step = jax.jit(jax.value_and_grad(value))
        text = step.lower(placed, *split).as_text()
        together = step(placed, *split)
    assert "@Sharding" in text or "sdy.sharding_constraint" in text
    assert_same(together, alone, 2e-5)


def test_conditions_matter_and_labels_beyond_the_null_class_are_loud():
    model, params = small(head="mlp"), random_params(head="mlp")
    x, t, y = batch()
    apply = jax.jit(model.apply)
    base = apply(params, x, t, y)
    assert np.abs(apply(params, x, t + 0.05, y) - base).max() > 1e-3
    assert np.abs(apply(params, x, t, jnp.full_like(y, 5)) - base).max() > 1e-3
    assert np.isnan(apply(params, x, t, jnp.full_like(y, 6))).all()


@pytest.mark.parametrize(("head", "place"), COMBINATIONS)
def test_first_prediction_is_zero_where_the_head_claims_it(head, place):
    """The authors do not zero the U-Net's last layer; amid the blocks the DiT's own final layer, which is zero, comes last."""
    model = small(head=head, placement=place)
    params = jax.jit(model.init)(jax.random.key(0))
    first = jax.jit(model.apply)(params, *batch())
    zero = head == "none" or place == "intermediate" or getattr(HEADS[head], "starts_at_zero", None)
    assert zero is None or bool(np.any(first)) != zero
    assert np.isfinite(first).all()
    assert zero is None or np.std(first) < 1


def test_the_heads_of_the_paper_claim_how_they_start():
    claims = {name: head.starts_at_zero for name, head in HEADS.items() if name in ("unet", "mlp", "coord_mlp", "attention")}
    assert claims == {"unet": False, "mlp": True, "coord_mlp": True, "attention": True}


def test_any_head_can_start_at_zero_or_not():
    for head, zero in (("unet", True), ("mlp", False)):
        params = jax.jit(small(head=head, head_zero_init=zero).init)(jax.random.key(0))
        assert bool(np.any(params["head"]["out"]["kernel"])) != zero


def test_transposed_convolutions_start_as_pytorch_starts_them():
    """U(+-1/sqrt(fan_in)) with fan_in = 4 x the output channels."""
    params = jax.jit(small(head="unet", head_width=32).init)(jax.random.key(0))
    for i, width in enumerate((32, 64)):
        lift, bound = params["head"][f"upsample_{i}"], 1 / np.sqrt(4 * width)
        assert lift["kernel"].shape == (2, 2, width, width)
        assert 0.98 * bound < np.abs(lift["kernel"]).max() <= bound and 0.8 * bound < np.abs(lift["bias"]).max() <= bound


def test_initial_values_follow_the_recipe():
    model = small(width=64, num_heads=4, head="mlp", num_classes=999)
    params = jax.jit(model.init)(jax.random.key(0))
    table = params["condition"]["label"]["table"]
    assert 0.0195 < np.std(table) < 0.0205 and table.shape == (1000, 64)
    embed = params["patch_embed"]["linear"]
    bound = np.sqrt(6 / (192 + 64))
    assert 0.99 * bound < np.abs(embed["kernel"]).max() <= bound and not embed["bias"].any()
    modulation = params["blocks"]["modulation"]
    assert 0.99 / 8 < np.abs(modulation["kernel"]).max() <= 1 / 8  # 1 / sqrt(64): adaLN does not start at zero
    assert 0.9 / 8 < np.abs(modulation["bias"]).max() <= 1 / 8
    assert np.abs(params["blocks"]["mlp"]["down"]["kernel"][0] - params["blocks"]["mlp"]["down"]["kernel"][1]).max() > 0.01


def test_the_start_of_head_and_labels_can_be_chosen():
    for head_init, variance in (("fan_in", 1 / 3), ("he", 2)):
        model = small(width=64, num_heads=4, head="unet", head_width=32, num_classes=999, head_init=head_init, label_std=0.4)
        params = jax.jit(model.init)(jax.random.key(0))
        fan_in = 9 * 64
        assert np.var(params["head"]["up_0"]["kernel"]) * fan_in == pytest.approx(variance, rel=0.05)
        assert np.std(params["condition"]["label"]["table"]) == pytest.approx(0.4, rel=0.02)


def test_time_is_read_unscaled_and_rope_spans_sixteen():
    features = condition.time_features(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(features[0], np.repeat([1.0, 0.0], 128), atol=1e-7)
    frequencies = 10.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(features[1], np.concatenate([np.cos(frequencies), np.sin(frequencies)]), atol=1e-6)
    for grid in [(4, 4), (2, 8)]:
        cos, sin = layers.rope_table(grid, 8)  # pairs: x and y at frequency 1, x and y at frequency 1/100
        angles = np.arctan2(sin[-1, 0], cos[-1, 0])
        np.testing.assert_allclose(np.exp(1j * angles), np.exp(1j * np.array([16, 16, 0.16, 0.16])), atol=1e-5)


def test_a_position_table_tells_equal_tokens_apart():
    table = layers.sincos_table((2, 3), 8)  # frequencies 1 and 1/100
    row, column = 1, 2
    expected = [f(p * w) for p in (column, row) for f in (np.sin, np.cos) for w in (1, 0.01)]
    np.testing.assert_allclose(table[row * 3 + column], expected, atol=1e-6)
    x, t, y = batch()
    flat = jnp.zeros_like(x)  # relative positions alone cannot tell one empty patch from another
    for position, varies in (("rope", False), ("rope+sincos", True)):
        out = np.asarray(jax.jit(small(head="mlp", position=position).apply)(random_params(head="mlp"), flat, t, y))
        patches = np.asarray(patchify(jnp.asarray(out), small().config.patch_size))
        assert (np.ptp(patches, axis=1).max() > 1e-3) == varies


@settings(deadline=None, max_examples=20)
@given(h=st.integers(1, 3), w=st.integers(1, 3), p=st.sampled_from([1, 2, 4]))
def test_unpatchify_undoes_patchify(h, w, p):
    images = jnp.arange(2 * h * p * w * p * 3, dtype=jnp.float32).reshape(2, h * p, w * p, 3)
    patches = patchify(images, p)
    assert patches.shape == (2, h * w, p, p, 3)
    np.testing.assert_array_equal(patches[1, -1], images[1, -p:, -p:])
    np.testing.assert_array_equal(unpatchify(patches, (h * p, w * p)), images)


def start(params, backbone, *, model):
    origin = starting.Origin(small(head="none").config, backbone)
    return starting.begin(params, origin, model=model, classes=())[0]


@pytest.mark.parametrize("place", PLACEMENTS)
def test_backbone_starts_from_a_dit_only_checkpoint(place):
    backbone = random_params(head="none")
    params = random_params(head="unet", placement=place)
    started = start(params, backbone, model=small(head="unet", placement=place).config)
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, params)
    stacks = [started[name]["mlp"]["down"]["kernel"] for name in ("blocks", "blocks_after") if name in started]
    np.testing.assert_array_equal(jnp.concatenate(stacks), backbone["blocks"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(started["condition"]["label"]["table"], backbone["condition"]["label"]["table"])
    kept = [name for name in params if "head" in name or name == "inject"]
    assert kept and all(started[name] is params[name] for name in kept)
    if "final" in params:
        jax.tree.map(np.testing.assert_array_equal, started["final"], backbone["final"])


def test_a_head_that_starts_at_zero_beside_the_final_layer_is_the_dit():
    backbone, dit = random_params(head="none"), small(head="none")
    model = small(head="unet", placement="residual", head_zero_init=True)
    started = start(jax.jit(model.init)(jax.random.key(4)), backbone, model=model.config)
    apply, expected = jax.jit(model.apply), jax.jit(dit.apply)(backbone, *batch())
    np.testing.assert_array_equal(apply(started, *batch()), expected)
    started["head"]["out"]["kernel"] += 1
    assert np.abs(apply(started, *batch()) - expected).max() > 1e-3


def test_backbone_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"do not fit this model: .*blocks.* instead of"):
        start(random_params(head="unet"), random_params(head="none", depth=3), model=small(head="unet").config)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"head": "unett"}, "unknown: it is one of unet, mlp"),
        ({"placement": "posthoc"}, "unknown: it is one of post_hoc"),
        ({"head": "none", "placement": "hybrid"}, "has no head to place"),
        ({"head_depth": 5}, r"model.patch_size=16 is not a multiple of 32"),
        ({"name": "DiP-XL"}, "not DiP-SIZE/PATCH"),
        ({"name": "DiP-XXL/16"}, "unknown: it is one of tiny, S"),
        ({"head_widht": 3}, "unknown model fields head_widht"),
        ({"head": "attention", "head_width": 200}, "multiple of 64"),
        ({"image_size": 250}, "not a multiple of model.patch_size"),
        ({"num_classes": 0}, "num_classes=0 is as many as the dataset has, and there is none here"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 1, or 0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(mistake, message):
    with pytest.raises(UserError, match=message) as caught:
        build(**mistake)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"do not fit model.image_size=\(16, 8\)"):
        small(head="mlp").apply(random_params(head="mlp"), *batch(image_size=(8, 16)))


# Every head and every placement at least once: the shorter table begins again.
_COUNT = max(len(REAL_HEADS), len(PLACEMENTS))
EACH_ONCE = [(REAL_HEADS[i % len(REAL_HEADS)], [*PLACEMENTS][i % len(PLACEMENTS)]) for i in range(_COUNT)]
EACH_ONCE += [("none", "post_hoc")]


@pytest.mark.parametrize(
    ("head", "place", "dtype"), [*((*pair, "float32") for pair in EACH_ONCE), ("attention", "hybrid", "bfloat16")]
)
def test_modulations_made_ahead_give_the_same_prediction(head, place, dtype):
    """Three times with two labels each, in one product, against one call per time that makes its own."""
    model, params = small(head=head, placement=place, dtype=dtype), random_params(head=head, placement=place)
    x, _, y = batch()
    ts = jnp.array([0.1, 0.5, 0.9])
    ahead = jax.jit(model.modulations)(params, ts, y)
    apply = jax.jit(model.apply)
    for s, t in enumerate(ts):
        plain = apply(params, x, jnp.full((2,), t), y)
        nothing = jnp.full((2,), jnp.nan)  # t and y are not read any more
        given = apply(params, x, nothing, y + 100, jax.tree.map(lambda a, s=s: a[s], ahead))
        scale = float(jnp.abs(plain).max())
        assert scale > 0.1 and float(jnp.abs(given - plain).max()) <= (1e-6 if dtype == "float32" else 2e-2) * scale


@pytest.mark.parametrize(("head", "place"), EACH_ONCE)
def test_cast_parameters_give_the_same_bits(head, place):
    model, params = small(head=head, placement=place, dtype="bfloat16"), random_params(head=head, placement=place)
    cast = model.cast(params)
    before, after = (sum(a.nbytes for a in jax.tree.leaves(tree)) for tree in (params["blocks"], cast["blocks"]))
    assert after < 0.55 * before
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(cast, *batch()), apply(params, *batch()))
    exact = small(head=head, placement=place).cast(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(params), strict=True))
