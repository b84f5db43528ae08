"""Internal guidance: the second output, its loss, its part in sampling, and training it alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import options_cases as case
import pytest
import small_training as small

from dip_jax import config, flow
from dip_jax.errors import UserError
from dip_jax.models import cost, dip, starting
from dip_jax.sampling import guidance, trajectories
from dip_jax.training import losses

ON = {"internal": True}
SHAPES = [{}, {"placement": "hybrid", "head": "unet", "head_width": 4}, {"placement": "intermediate", "head": "mlp"}]


def model(**fields) -> dip.DiP:
    return dip.from_config(config.Model(**small.FIELDS | fields))


def inputs() -> tuple:
    x = jax.random.normal(jax.random.key(5), (2, 16, 16, 3))
    return x, jnp.array([0.2, 0.7]), jnp.array([1, 3], jnp.int32)


def test_the_velocity_is_its_formula_in_float64_and_that_of_the_authors_sampler():
    a = {name: value.astype(np.float64) for name, value in case.internal().items()}
    each = [a[f"early{half}"] + case.SCALE * (a[f"final{half}"] - a[f"early{half}"]) for half in ("", "_null")]
    expected = each[1] + case.GUIDANCE * (each[0] - each[1])
    options = config.Sample(guidance=case.GUIDANCE, internal_guidance=case.SCALE)

    def predict(x, t, y):
        null = (y == 9)[:, None, None, None]
        final, early = (
            jnp.where(null, np.repeat(a32[f"{name}_null"], 2, 0), np.repeat(a32[name], 2, 0)) for name in ("final", "early")
        )
        return guidance.internal(final, early, t, sample=options)

    a32 = case.internal()
    guide = guidance.Guide(predict, jnp.zeros(2, jnp.int32), case.GUIDANCE, 9, None)
    found = np.asarray(guide.velocity(jnp.asarray(a32["x"]), jnp.zeros(2), (None, None), guided=True))
    np.testing.assert_allclose(found, expected, atol=5e-6, rtol=1e-6)
    np.testing.assert_allclose(found, case.answers()["internal/velocity"], atol=1e-5)


def test_outside_its_interval_the_last_output_speaks_alone():
    final, early = (jnp.asarray(case.internal()[name]) for name in ("final", "early"))
    options = config.Sample(internal_guidance=3.0, internal_interval=(0.1, 0.7))
    both = guidance.internal(final, early, jnp.array([0.7, 0.8]), sample=options)
    np.testing.assert_allclose(both[0], early[0] + 3 * (final[0] - early[0]), rtol=1e-5)
    np.testing.assert_allclose(both[1], final[1], atol=1e-6)


def test_the_loss_is_that_of_the_authors_code():
    arrays = {name: jnp.asarray(value) for name, value in case.internal_batch().items()}
    x_t = flow.interpolate(arrays["image"], arrays["noise"], arrays["t"])
    target = flow.velocity(arrays["image"], arrays["noise"])
    corrupted = flow.Corrupted(x_t=x_t, t=arrays["t"], y=jnp.zeros(3, jnp.int32), target=target)

    @dataclasses.dataclass(frozen=True)
    class Said:
        config = config.Model()

        def convert_once(self, params):
            return params

        def apply_all(self, params, *inputs, after):
            return dip.Outputs(arrays["final"], None, arrays["early"])

    found = losses.losses({}, (corrupted, arrays["image"]), model=Said(), objective=config.Flow())
    theirs = case.answers()["internal/losses"]
    np.testing.assert_allclose([found[n] for n in ("loss_flow", "loss_internal", "loss")], theirs, rtol=1e-5)


@pytest.mark.parametrize("fields", SHAPES)
def test_it_is_the_final_layer_of_the_tokens_after_its_block_and_changes_nothing_else(fields):
    plain, with_it = model(**fields), model(**fields, **ON)
    params = small.random_params(with_it)
    assert with_it.config.internal_block == 1 and set(params) - set(jax.eval_shape(plain.init, jax.random.key(0))) == {
        "internal"
    }
    alone = {name: part for name, part in params.items() if name != "internal"}
    said, tokens = plain.apply_with_features(alone, *inputs(), after=1)
    found = with_it.apply_all(params, *inputs(), after=2)
    np.testing.assert_array_equal(found.prediction, said)
    np.testing.assert_array_equal(found.tokens, plain.apply_with_features(alone, *inputs(), after=2)[1])
    ahead = with_it.modulations(params, inputs()[1][:1], inputs()[2])
    shift, scale = np.moveaxis(np.asarray(ahead.internal[0, :, 0], np.float64)[:, :, None], 1, 0)
    x = np.asarray(tokens, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    first = with_it.apply_all(params, inputs()[0], jnp.full(2, 0.2), inputs()[2])  # `ahead` is of t = 0.2
    x = x[0] * (1 + scale[0]) + shift[0]
    linear = {name: np.asarray(part, np.float64) for name, part in params["internal"]["linear"].items()}
    patches = (x @ linear["kernel"] + linear["bias"]).reshape(2, 2, 8, 8, 3)
    np.testing.assert_allclose(first.internal[0], patches.transpose(0, 2, 1, 3, 4).reshape(16, 16, 3), atol=2e-5)


def test_parameters_that_both_have_start_alike():
    plain, with_it = (m.init(jax.random.key(3)) for m in (model(), model(**ON)))
    jax.tree.map(np.testing.assert_array_equal, plain, {name: with_it[name] for name in plain})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(with_it["internal"]))  # as the DiT's own output starts


def drawn(m: dip.DiP, params, **options) -> np.ndarray:
    sample = config.Sample(steps=4, batch_size=4, **options)
    return next(trajectories.draw_batches(m, params, labels=[0, 1, 2], seed=0, options=sample))[1]


def test_samples_are_the_same_at_scale_one_and_others_beyond(monkeypatch):
    with_it = model(**ON)
    params = small.random_params(with_it)
    alone = {name: part for name, part in params.items() if name != "internal"}
    np.testing.assert_array_equal(drawn(with_it, params), drawn(model(), alone))
    guided = drawn(with_it, params, internal_guidance=2.0)
    assert (guided != drawn(with_it, params)).any()
    monkeypatch.setattr(trajectories, "AHEAD_BYTES", 0)
    jax.clear_caches()
    assert np.abs(guided.astype(int) - drawn(with_it, params, internal_guidance=2.0)).max() <= 1
    with pytest.raises(UserError, match="needs a model with a second output"):
        drawn(model(), alone, internal_guidance=2.0)


def test_training_it_alone_moves_nothing_else_to_the_bit():
    optimizer = config.Optim(learning_rate=1e-2, weight_decay=0.1, ema_decays=(0.9,))
    before, _ = small.run(ON, 0)
    after, history = small.run(ON, 3, optimizer=optimizer, only="internal")
    for trees in ((before.params, after.params), (before.ema, after.ema)):
        old, new = ({name: part for name, part in tree.items() if name != "internal"} for tree in trees)
        jax.tree.map(np.testing.assert_array_equal, old, new)
        assert np.any(trees[1]["internal"]["linear"]["kernel"])
    assert all(row["loss"] == pytest.approx(row["loss_flow"] + 0.5 * row["loss_internal"]) for row in history)


def test_a_mesh_of_three_axes_and_an_unrolled_stack_train_alike():
    one = small.run(ON, 2)[1]
    many = small.run(ON | {"scan_layers": False, "remat": "full"}, 2, mesh=config.Mesh(data=2, fsdp=2, tensor=2))[1]
    for name in ("loss", "loss_internal", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in one], [row[name] for row in many], rtol=2e-4)


def test_a_model_with_it_starts_from_one_without_and_from_one_with_it():
    with_it = model(**ON)
    fresh = with_it.init(jax.random.key(0))
    rows = starting.Rows((0, 1, 2), "")
    other = small.random_params(with_it)
    alone = {name: part for name, part in other.items() if name != "internal"}
    for origin, theirs in ((starting.Origin(model().config, alone), False), (starting.Origin(with_it.config, other), True)):
        started = starting.start_from(fresh, origin, model=with_it.config, rows=rows)
        jax.tree.map(np.testing.assert_array_equal, started["blocks"], other["blocks"])
        jax.tree.map(np.testing.assert_array_equal, started["internal"], (other if theirs else fresh)["internal"])
        said = starting.describe(fresh, origin, model=with_it.config, rows=rows)
        assert ("a new second output" in said) is not theirs


def test_it_costs_less_than_two_per_cent_of_a_step():
    plain, with_it = (sum(cost.forward_flops(config.Model(internal=on)).values()) for on in (False, True))
    assert 0 < with_it / plain - 1 < 0.003
    assert cost.forward_flops(config.Model(internal=True))["internal"] == 2 * (256 * 1152 * 768 + 2 * 1152**2)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="need the second output"):
        config.Config(sample=config.Sample(internal_guidance=1.5))
    with pytest.raises(UserError, match="need the second output"):
        config.Config(train=config.Train(only="internal"))
    on = config.Model(internal=True)
    with pytest.raises(UserError, match=r"set repa.weight=0"):
        config.Config(model=on, train=config.Train(only="internal"), repa=config.Repa(weight=0.5))
    with pytest.raises(UserError, match=r"model.internal_after=27 must lie in 1..model.depth=26"):
        config.Model(internal=True, internal_after=27)
    assert on.internal_block == 8
