"""Rules: a name without one is an error, a mesh axis is used once, a constraint is really in the compiled program."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.runtime import sharding


def test_mesh_takes_the_rest_and_refuses_what_does_not_fit():
    assert dict(sharding.make_mesh(config.Mesh(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"needs 16 devices.*there are 8"):
        sharding.make_mesh(config.Mesh(data=4, fsdp=4))
    with pytest.raises(UserError, match="8"):
        sharding.make_mesh(config.Mesh(fsdp=3))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What the arrangement of a mesh reads from a device."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int = 0
    core_on_chip: int = 0


def fake_devices(platform: str, *, slices: int, torus: tuple[int, int, int]) -> list[FakeDevice]:
    """So many slices (GPU: nodes) of a torus of chips each; the last slice comes first, as JAX promises no order."""
    kind = {"tpu": "TPU v5", "gpu": "NVIDIA H100 80GB HBM3"}[platform]
    places = [(place, k) for k in range(slices) for place in itertools.product(*map(range, torus))]
    return [FakeDevice(i, platform, kind, place[::-1], k) for i, (place, k) in reversed(list(enumerate(places)))]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("sizes", [(32, 1, 1), (4, 4, 2), (2, 8, 2), (2, 1, 16)], ids=str)
def test_only_data_is_split_over_slices(platform, sizes):
    """Two slices of 16: the first half of data is one, the second the other."""
    placed = sharding.arrange(sizes, fake_devices(platform, slices=2, torus=(2, 2, 4)))
    assert placed.shape == sizes and len({device.id for device in placed.flat}) == 32
    first, second = np.split(placed, 2)
    assert {device.slice_index for device in first.flat} == {0} and {device.slice_index for device in second.flat} == {1}


def test_other_axes_stay_inside_a_tpu_slice_but_may_leave_a_node_of_gpus():
    with pytest.raises(UserError, match=r"mesh.data=3 is not divisible by the 2 slices"):
        sharding.arrange((3, 2, 2), fake_devices("tpu", slices=2, torus=(1, 2, 3)))
    with pytest.raises(UserError, match=r"mesh.data=1 is not divisible by the 2 slices"):
        sharding.arrange((1, 16, 1), fake_devices("tpu", slices=2, torus=(2, 2, 2)))
    placed = sharding.arrange((1, 16, 1), fake_devices("gpu", slices=2, torus=(2, 2, 2)))
    assert [device.slice_index for device in placed.flat] == [0] * 8 + [1] * 8


@pytest.mark.parametrize("sizes", [(64, 2, 1), (16, 4, 2), (8, 8, 2), (2, 32, 2)], ids=str)
def test_a_torus_is_cut_where_the_mesh_asks_for_it(sizes):
    """4 x 4 x 8 chips have no dimension of two."""
    placed = sharding.arrange(sizes, fake_devices("tpu", slices=1, torus=(4, 4, 8)))
    assert placed.shape == sizes and len({device.coords for device in placed.flat}) == 128


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


def array_on(mesh: jax.sharding.Mesh, shape, *entries) -> jax.ShapeDtypeStruct:
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)


@pytest.mark.parametrize(
    ("sizes", "hosts", "shape", "entries", "parts"),
    [
        ((8, 1, 1), 2, (3, 4), (), (None, "hosts")),  # 3 rows are not halved
        ((8, 1, 1), 4, (3, 4), (), (None, "hosts")),
        ((2, 4, 1), 2, (8, 4), ("fsdp", None), (("fsdp", "hosts"),)),
        ((2, 4, 1), 2, (4, 6), ("fsdp", None), ("fsdp", "hosts")),  # 4 rows over fsdp leave one for each
        ((4, 1, 2), 2, (4, 4), (None, "tensor"), ("hosts", "tensor")),
    ],
)
def test_hosts_that_hold_the_same_each_hold_a_part(sizes, hosts, shape, entries, parts):
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    array = array_on(mesh, shape, *entries)
    owner = {device: number * hosts // 8 for number, device in enumerate(mesh.devices.flat)}
    found = sharding.split_over_hosts(array, host_of=owner.get)
    assert found.mesh.devices.flat[:].tolist() == mesh.devices.flat[:].tolist()
    assert found.is_equivalent_to(jax.sharding.NamedSharding(found.mesh, jax.sharding.PartitionSpec(*parts)), len(shape))
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    part = jax.device_put(values, found)
    held = [sum(s.data.size for s in part.addressable_shards if owner[s.device] == host) for host in range(hosts)]
    whole = [s.data.size for s in jax.device_put(values, array.sharding).addressable_shards]
    assert held == [sum(whole) // hosts**2] * hosts
    np.testing.assert_array_equal(jax.jit(lambda x: x, out_shardings=array.sharding)(part), values)


@pytest.mark.parametrize(
    ("sizes", "owners", "shape", "entries"),
    [
        ((8, 1, 1), [0] * 8, (8, 8), ()),  # one host
        ((1, 8, 1), [0] * 4 + [1] * 4, (8, 8), ("fsdp",)),  # no two hold the same
        ((8, 1, 1), [0] * 4 + [1] * 4, (3, 5), ()),  # no dimension is halved
        ((8, 1, 1), [0] * 4 + [1] * 4, (), ()),
        ((8, 1, 1), [0] * 4 + [1] * 4, (8, 8), ("data",)),  # every device has a part of its own already
        ((4, 2, 1), [0, 1] * 4, (8, 8), ()),  # both hosts in every group
        ((8, 1, 1), [0] * 2 + [1] * 6, (8, 8), ()),  # groups of different sizes
        ((8, 1, 1), [0, 0, 1, 1, 0, 0, 1, 1], (8, 8), ()),  # one host in two groups
    ],
)
def test_what_is_not_split_over_hosts_stays_as_it_is(sizes, owners, shape, entries):
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    array = array_on(mesh, shape, *entries)
    owner = dict(zip(mesh.devices.flat, owners, strict=True))
    assert sharding.split_over_hosts(array, host_of=owner.get) is array.sharding
