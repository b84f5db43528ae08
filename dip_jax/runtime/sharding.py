"""Logical axis names -> mesh axes -> shardings, in pure JAX.

Parameters and activations carry logical names ("embed", "mlp", "batch", ...). One table of rules maps each name to a mesh axis
or to None (replicated). Everything is jitted under `jax.set_mesh(mesh)`; a name without a rule is an error, never silence.

Example:
    >>> mesh = make_mesh(config.mesh)
    >>> shapes = jax.eval_shape(model.init, key)
    >>> with jax.set_mesh(mesh), use_rules(config.mesh.rules):
    ...     params = jax.jit(model.init, out_shardings=shardings(mesh, model.logical_axes(), shapes))(key)
"""

import contextlib
import contextvars
import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.typing import Axes

AXES = ("data", "fsdp", "tensor")
_HOSTS = "hosts"  # beside these, of `split_over_hosts`

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# First match wins. Activations: batch, tokens, patches, act_*. Parameters: the rest.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("tokens", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("patches", ("data", "fsdp")),  # batch and patches folded into one axis
    ("height", None),
    ("width", None),
    ("channels", None),
    ("layers", None),  # the scanned stack
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("modulation", "tensor"),  # adaLN outputs
    ("vocab", None),  # label table
    ("pixels", None),  # P * P * 3
    ("frequency", None),
    ("head_in", None),  # the Patch Detailer Head is 0.9 % of the weights: replicated
    ("head_out", None),
    ("kernel", None),
    ("norm", None),
)

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh data x fsdp x tensor, as `arrange` places it.

    Raises:
        UserError: if the axes do not multiply to the number of devices, or as `arrange`.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.data, sizes.fsdp, sizes.tensor]
    if -1 in shape:
        known = math.prod(n for n in shape if n > 0)
        shape[shape.index(-1)] = max(len(devices) // known, 1)
    if math.prod(shape) != len(devices):
        raise UserError(_mismatch(sizes, needed=math.prod(shape), found=len(devices)))
    return jax.sharding.Mesh(arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _mismatch(sizes: config.Mesh, *, needed: int, found: int) -> str:
    """What is wrong and what helps, by the names of the axes that somebody has set."""
    given = {f"mesh.{axis}": getattr(sizes, axis) for axis in AXES}
    named = " x ".join(f"{name}={size}" for name, size in given.items() if size not in (1, -1)) or "mesh.data=1"
    if -1 in given.values():
        return f"{named} needs a multiple of {needed} devices but there are {found}: choose sizes that divide their number"
    inner = sizes.fsdp * sizes.tensor
    way_out = (
        f"mesh.data={found // inner}, or -1, takes them all" if found % inner == 0 else "choose sizes that divide their number"
    )
    return f"{named} needs {needed} devices but there are {found}: {way_out}"


def arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of `shape` (data, fsdp, tensor): neighbours on the wires are neighbours on the inner axes.

    Several TPU slices or nodes of GPUs split data; what is inside one stays inside. `jax.make_mesh` would refuse several of
    them, and a dimension of a TPU's torus that has to be cut.

    Raises:
        UserError: if TPU slices do not divide the data axis.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # A node of GPUs is a slice to JAX. They are numbered node by node: an axis may go on in the next one.
    if slices == 1 or devices[0].platform == "gpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *inner = shape
    if data % slices:
        raise UserError(
            f"mesh.data={data} is not divisible by the {slices} slices of the machine, and no other axis goes over their slow "
            f"network: make it a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def check_split(mesh: Mapping[str, int], *, model: config.Model, batch_size: int, accumulate: int) -> None:
    """Refuses sizes that the axes of a mesh do not divide.

    Raises:
        UserError: for a batch that does not split over devices and micro-batches, or heads that do not split over tensor.
    """
    shards = mesh["data"] * mesh["fsdp"] * accumulate
    if batch_size % shards:
        raise UserError(
            f"data.batch_size={batch_size} is not divisible by the {shards} parts that data x fsdp x optim.accumulate split it "
            "into: change one of them"
        )
    if model.num_heads % mesh["tensor"]:
        raise UserError(
            f"mesh.tensor={mesh['tensor']} does not divide model.num_heads={model.num_heads}: choose a divisor, no head is cut"
        )


@contextlib.contextmanager
def use_rules(own: Rules) -> Iterator[None]:
    """Puts the config's own rules before `RULES` for `spec`, `shardings` and `constrain` inside the block.

    Raises:
        UserError: for a rule of a logical axis that nothing has.
    """
    known = [name for name, _ in RULES]
    for name, _ in own:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"mesh.rules names logical axis {name!r}, which nothing has: did you mean {nearest!r}?")
    token = _rules.set((*own, *RULES))
    try:
        yield
    finally:
        _rules.reset(token)


def spec(axes: Axes) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; a mesh axis is used once, by the first that asks.

    Raises:
        UserError: for a logical axis that has no rule.
    """
    table = dict(reversed(_rules.get()))
    used: set[str] = set()
    entries = []
    for name in axes:
        if name is not None and name not in table:
            nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
            raise UserError(f"logical axis {name!r} has no sharding rule: did you mean {nearest!r}?")
        target = table.get(name)
        wanted = (target,) if isinstance(target, str) else (target or ())
        free = tuple(axis for axis in wanted if axis not in used)
        used.update(free)
        entries.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*entries)


def shardings(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, logical_axes: Any, arrays: Any) -> Any:
    """A tree of logical axes -> the same tree of `NamedSharding`.

    Args:
        mesh: the devices, or their plan.
        logical_axes: a tuple of names per array.
        arrays: the tree of arrays (or their shapes); a dimension that its mesh axis does not divide stays whole.
    """

    def place(axes, array):
        return NamedSharding(mesh, _divisible(spec(axes), array.shape, mesh.shape))

    return jax.tree.map(place, logical_axes, arrays, is_leaf=is_axes)


def _divisible(partition: PartitionSpec, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """`partition` without the entries that do not divide their dimension, such as a SwiGLU of width 3413 over two devices."""

    def ways(entry: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh_shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))

    return PartitionSpec(*(entry if size % ways(entry) == 0 else None for entry, size in zip(partition, shape, strict=True)))


def split_over_hosts(
    array: jax.ShapeDtypeStruct, *, host_of: Callable[[jax.Device], int] = lambda device: device.process_index
) -> NamedSharding:
    """Where groups of hosts hold the same array, a sharding by which each holds a part of it: what to read it onto.

    The array's own sharding where no two groups hold the same, or their number divides no dimension. The devices are the same
    in the same order, so that one jitted identity makes the one of the other.

    Args:
        array: with a sharding on a mesh of `make_mesh`.
        host_of: by which devices belong together.
    """
    placed = array.sharding
    mesh = placed.mesh
    rows = [{host_of(device) for device in row.flat} for row in mesh.devices]  # along data
    groups, lengths = zip(*((hosts, len(list(run))) for hosts, run in itertools.groupby(rows)), strict=True)
    apart = sum(map(len, groups)) == len(set().union(*groups)) and len(set(lengths)) == 1
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in placed.spec]
    entries += [()] * (array.ndim - len(entries))
    if len(groups) == 1 or not apart or any(AXES[0] in axes for axes in entries):
        return placed
    for dim, axes in enumerate(entries):
        if array.shape[dim] % (len(groups) * math.prod(mesh.shape[axis] for axis in axes)) == 0:
            devices = mesh.devices.reshape(len(groups), -1, *mesh.devices.shape[1:])
            split = jax.sharding.Mesh(devices, (_HOSTS, *AXES), axis_types=(AxisType.Auto,) * 4)
            return NamedSharding(split, PartitionSpec(*entries[:dim], (*axes, _HOSTS), *entries[dim + 1 :]))
    return placed


def is_axes(node: Any) -> bool:
    """True for a tuple of logical axis names, the leaf of a tree of them."""
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes inside jit; the identity where no mesh is set.

    Raises:
        UserError: for a logical axis that has no rule, also without a mesh.
        ValueError: if the number of names is not the array's rank.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    partition = spec(axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible(partition, x.shape, mesh.shape))
