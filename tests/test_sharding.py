"""Rules: a name without one is an error, a mesh axis is used once, a constraint is really in the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dip_jax import config, sharding
from dip_jax.errors import UserError


def test_mesh_takes_the_rest_and_refuses_what_does_not_fit():
    assert dict(sharding.make_mesh(config.Mesh(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"needs 16 devices.*there are 8"):
        sharding.make_mesh(config.Mesh(data=4, fsdp=4))
    with pytest.raises(UserError, match="8"):
        sharding.make_mesh(config.Mesh(fsdp=3))


def test_spec():
    assert sharding.spec(("batch", "tokens", "act_embed")) == P(("data", "fsdp"), None, None)
    assert sharding.spec(("embed", "mlp")) == P("fsdp", "tensor")
    assert sharding.spec(("embed", None)) == P("fsdp", None)


def test_a_mesh_axis_is_used_once():
    assert sharding.spec(("embed", "embed")) == P("fsdp", None)


def test_a_misspelt_axis_is_an_error_with_and_without_a_mesh():
    with pytest.raises(UserError, match=r"'emebd'.*'embed'"):
        sharding.spec(("emebd",))
    with pytest.raises(UserError, match="tokns"):
        sharding.constrain(jnp.zeros((2, 2)), "batch", "tokns")


def test_own_rules_come_first_and_end_with_the_block():
    with sharding.use_rules((("embed", None),)):
        assert sharding.spec(("embed",)) == P(None)
    assert sharding.spec(("embed",)) == P("fsdp")


def test_the_constraint_is_in_the_lowered_program():
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "act_mlp")).lower(jnp.zeros((8, 4)))
        out = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "act_mlp"))(jnp.zeros((8, 4)))
    assert "sharding_constraint" in lowered.as_text()
    assert out.sharding.spec == P(("data", "fsdp"), "tensor")


def test_what_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    placed = sharding.shardings(mesh, {"w": ("embed", "mlp")}, {"w": jnp.zeros((32, 85))})
    assert placed["w"].spec == P("fsdp", None)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain(x, "batch", "act_mlp"))(jnp.zeros((8, 85)))
    assert out.shape == (8, 85)


def test_rank_must_match():
    with pytest.raises(ValueError, match="2 logical axes"):
        sharding.constrain(jnp.zeros(3), "batch", "tokens")
