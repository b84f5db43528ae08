"""The training state: what a step changes and a checkpoint keeps. Born sharded, the same on every mesh."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dip_jax.runtime import sharding
from dip_jax.training.repa import Alignment, with_projector, without_projector
from dip_jax.typing import Params, PRNGKey


@struct.dataclass
class TrainState:
    """Step counter, float32 parameters, optimizer state, and the exponential moving average of the parameters.

    With representation alignment `params` has the projector beside the model's parts (`repa.PROJECTOR`); the average has not.
    """

    step: Any  # updates done: int32 scalar; like the other fields, its shape or sharding in trees of those
    params: Params
    opt_state: Any
    ema: Params

    @property
    def weights(self) -> Params:
        """The model's own parameters, as the last update left them."""
        return without_projector(self.params)


def create_state(
    model: Any, optimizer: optax.GradientTransformation, key: PRNGKey, *, alignment: Alignment | None = None
) -> TrainState:
    """The state at step 0. The EMA starts as the parameters. Pure: jit it (see `init_sharded`)."""
    params = model.init(key)
    ema = jax.tree.map(jnp.copy, params)  # a buffer of its own: the step donates both
    if alignment is not None:
        params = with_projector(params, alignment.init(key))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), ema=ema)


def state_shardings(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    zero1: bool = False,
    alignment: Alignment | None = None,
) -> TrainState:
    """The sharding of every array of the state, by the logical axes of the parameters.

    Optimizer moments follow their parameter; scalars are replicated. With `zero1` the moments and the EMA are also split
    over the data axis, along the first dimension that it divides (ZeRO stage 1).
    """
    abstract = jax.eval_shape(functools.partial(create_state, model, optimizer, alignment=alignment), jax.random.key(0))
    axes = model.logical_axes()
    if alignment is not None:
        axes = with_projector(axes, alignment.projector.logical_axes())
    params = sharding.shardings(mesh, axes, abstract.params)
    averaged = jax.tree.map(functools.partial(_split_over_data, mesh), params, abstract.params) if zero1 else params
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract.opt_state, averaged, transform_non_params=lambda _: replicated
    )
    return TrainState(step=replicated, params=params, opt_state=opt_state, ema=without_projector(averaged))


def abstract_state(
    model: Any, optimizer: optax.GradientTransformation, shardings: TrainState, *, alignment: Alignment | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing it: what a checkpoint is restored onto."""
    shapes = jax.eval_shape(functools.partial(create_state, model, optimizer, alignment=alignment), jax.random.key(0))
    return jax.tree.map(lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes, shardings)


def init_sharded(
    model: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: TrainState,
    *,
    alignment: Alignment | None = None,
) -> TrainState:
    """`create_state` compiled so that every array is born where `shardings` puts it; same values on every mesh."""
    create = jax.jit(functools.partial(create_state, model, optimizer, alignment=alignment), out_shardings=shardings)
    return create(jax.random.key(seed))


def _split_over_data(mesh: Mesh | AbstractMesh, placed: NamedSharding, array: jax.ShapeDtypeStruct) -> NamedSharding:
    entries = [*placed.spec, *[None] * (array.ndim - len(placed.spec))]
    split = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    if any("data" in axes for axes in split):  # by the config's own rules
        return placed
    for dim, axes in enumerate(split):
        if array.shape[dim] % math.prod(mesh.shape[axis] for axis in (*axes, "data")) == 0:
            entries[dim] = (*axes, "data") if axes else "data"
            return NamedSharding(mesh, PartitionSpec(*entries))
    return placed
