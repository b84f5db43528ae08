"""In-context class tokens: what joins, how it is rotated and dropped, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import options_cases as case
import pytest
import small_training as small
from flax.traverse_util import flatten_dict

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import condition, cost, dip, layers, starting

ON = {"context_tokens": 4}
PLACES = [
    ({"context_after": 0}, ["blocks_context"]),
    ({}, ["blocks", "blocks_context"]),
    (
        {"head": "unet", "head_width": 4, "placement": "hybrid", "inject_after": 2},
        ["blocks", "blocks_after_context", "blocks_context"],
    ),
    ({"head": "mlp", "placement": "intermediate", "context_after": 2}, ["blocks", "blocks_after", "blocks_after_context"]),
]


def model(**fields) -> dip.DiP:
    return dip.from_config(config.Model(**small.FIELDS | fields))


def inputs() -> tuple:
    return jax.random.normal(jax.random.key(5), (2, 16, 16, 3)), jnp.array([0.2, 0.7]), jnp.array([1, 3], jnp.int32)


def test_the_tokens_are_those_of_the_authors_code():
    given = case.context()
    module = condition.ContextTokens(config.Model(**small.FIELDS | {"context_tokens": case.CONTEXT}))
    made = module.apply({"params": {"table": given["table"]}}, jnp.asarray(given["label"]))
    np.testing.assert_allclose(made, given["label"].astype(np.float64)[:, None] + given["table"], rtol=1e-6)
    np.testing.assert_allclose(made, case.answers()["context/tokens"], atol=1e-5)


def test_attention_over_them_is_that_of_the_authors_code():
    """1e-5. Their pairs are neighbours, first those of the rows; ours are halves, x and y in turn."""
    given, head = case.attention(), case.WIDTH // case.HEADS
    quarter = head // 4
    pairs = [quarter * (1 - i % 2) + i // 2 for i in range(head // 2)]
    columns = np.array([2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs])
    qkv = given["qkv"].reshape(3, case.HEADS, head, case.WIDTH)
    qkv = np.concatenate([qkv[:2][:, :, columns], qkv[2:]]).reshape(3, case.WIDTH, case.WIDTH)
    params = {
        "qkv": {"kernel": qkv.transpose(2, 0, 1)},
        "proj": {"kernel": given["proj"].T, "bias": given["proj_bias"]},
        "q_norm": {"scale": given["q_norm"][columns]},
        "k_norm": {"scale": given["k_norm"][columns]},
    }
    attention = layers.Attention(case.HEADS, (case.GRID, case.GRID), context=case.CONTEXT)
    found = attention.apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(given["x"]))
    np.testing.assert_allclose(found, case.answers()["context/attention"], atol=1e-5)


def test_they_are_not_rotated_and_the_image_is_as_before():
    with_them, without = layers.rope_table((2, 3), 8, 4), layers.rope_table((2, 3), 8)
    for part, image, value in zip(with_them, without, (1, 0), strict=True):
        np.testing.assert_array_equal(part[:4], np.full((4, 1, 4), value))
        np.testing.assert_array_equal(part[4:], image)


@pytest.mark.parametrize(("fields", "stacks"), PLACES)
def test_they_join_where_they_should_and_reach_the_output(fields, stacks):
    with_them = model(**ON, **fields)
    params = small.random_params(with_them)
    assert sorted(name for name in params if name.startswith("blocks")) == stacks
    assert sum(params[name]["mlp"]["down"]["kernel"].shape[0] for name in stacks) == 3
    said, tokens = with_them.apply_with_features(params, *inputs(), after=3)
    assert said.shape == (2, 16, 16, 3) and tokens.shape == (2, 4, 32)

    def output(table):
        return jnp.sum(jnp.square(with_them.apply({**params, "context": {"table": table}}, *inputs())))

    assert (jnp.abs(jax.grad(output)(params["context"]["table"])).sum(axis=1) > 0).all()
    ahead = with_them.modulations(params, jnp.full(1, 0.2), inputs()[2])
    x, _, y = inputs()
    now = jax.tree.map(lambda a: a[0], ahead)
    np.testing.assert_allclose(
        with_them.apply(params, x, jnp.full(2, 0.2), y), with_them.apply(params, x, jnp.ones(2), y, now), atol=1e-5
    )


def test_blocks_before_them_do_not_see_them():
    first = model(**ON, context_after=1)
    params = small.random_params(first)
    other = {**params, "context": {"table": params["context"]["table"] + 1}}
    for after, same in ((1, True), (2, False)):
        tokens = [first.apply_with_features(p, *inputs(), after=after)[1] for p in (params, other)]
        assert np.array_equal(*tokens) is same


def test_one_joined_block_is_the_plain_block_over_all_tokens():
    """The stack against its formula: concatenate, one `Block` with identity rotation in front, drop."""
    m = model(**ON, context_after=2)
    params = small.random_params(m)
    tokens = m.apply_with_features(params, *inputs(), after=2)[1]
    _, c, label = condition.Condition(m.config).apply({"params": params["condition"]}, *inputs()[1:])
    context = condition.ContextTokens(m.config).apply({"params": params["context"]}, label)
    block = layers.Block(2, (2, 2), context=4)
    weights = jax.tree.map(lambda a: a[0], params["blocks_context"])
    expected = block.apply({"params": weights}, jnp.concatenate([context, tokens], axis=1), c)[:, 4:]
    np.testing.assert_allclose(m.features(params, *inputs()), expected, atol=1e-5)


def test_a_mesh_of_three_axes_and_an_unrolled_stack_train_alike():
    fields = ON | {"internal": True, "internal_after": 2}
    one = small.run(fields, 2)[1]
    many = small.run(fields | {"scan_layers": False, "remat": "full"}, 2, mesh=config.Mesh(data=2, fsdp=2, tensor=2))[1]
    for name in ("loss", "loss_internal", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in one], [row[name] for row in many], rtol=2e-4)


@pytest.mark.parametrize("fields", [{}, {"placement": "intermediate", "head": "mlp", "inject_after": 2}])
def test_a_model_with_them_starts_from_one_without_and_back(fields):
    plain, with_them = model(), model(**ON, **fields)
    old = small.random_params(plain)
    rows = starting.Rows((0, 1, 2), "")
    started = starting.start_from(
        with_them.init(jax.random.key(0)), starting.Origin(plain.config, old), model=with_them.config, rows=rows
    )
    assert "new in-context tokens" in starting.describe(
        started, starting.Origin(plain.config, old), model=with_them.config, rows=rows
    )
    back = starting.start_from(
        plain.init(jax.random.key(1)), starting.Origin(with_them.config, started), model=plain.config, rows=rows
    )
    for path, leaf in flatten_dict(old["blocks"]).items():
        np.testing.assert_array_equal(flatten_dict(back["blocks"])[path], leaf)


def test_their_cost_is_counted():
    plain, with_them = (cost.forward_flops(config.Model(context_tokens=n)) for n in (0, 32))
    share = sum(with_them.values()) / sum(plain.values()) - 1
    assert 0.07 < share < 0.09
    tokens, d, inner = 256 + 32, 1152, int(2 * 4 * 1152 / 3)
    assert with_them["blocks_context"] == 2 * 18 * (tokens * (4 * d * d + 3 * d * inner) + 2 * tokens**2 * d + 6 * d * d)
    assert with_them["blocks"] * 26 == plain["blocks"] * 8


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"model.context_after=26 must lie in 0..25, below model.depth"):
        config.Model(context_tokens=32, context_after=26)
    with pytest.raises(UserError, match="must not be negative"):
        config.Model(context_tokens=-1)
    assert config.Model(context_tokens=32).context_start == 8 and config.Model().context_start == 26
