"""The training state: what a step changes and a checkpoint keeps. Born sharded, the same on every mesh."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dip_jax.runtime import sharding, target
from dip_jax.training.repa import Alignment, with_projector, without_projector
from dip_jax.typing import Params, PRNGKey

_TILE = 8  # rows of a tile of a TPU's memory


@struct.dataclass
class TrainState:
    """Step counter, float32 parameters, optimizer state, and the exponential moving averages of the parameters.

    With representation alignment `params` has the projector beside the model's parts (`repa.PROJECTOR`); the averages have not.
    """

    step: Any  # updates done: int32 scalar; like the other fields, its shape or sharding in trees of those
    params: Params
    opt_state: Any
    emas: tuple[Params, ...]  # by `optim.ema_decays`

    @property
    def ema(self) -> Params:
        """The average of the first decay: what samples are drawn from."""
        return self.emas[0]

    @property
    def weights(self) -> Params:
        """The model's own parameters, as the last update left them."""
        return without_projector(self.params)


def create_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    *,
    alignment: Alignment | None = None,
    averages: int = 1,
) -> TrainState:
    """The state at step 0. The averages start as the parameters. Pure: jit it (see `init_sharded`)."""
    params = model.init(key)
    emas = tuple(jax.tree.map(jnp.copy, params) for _ in range(averages))  # buffers of their own: the step donates all
    if alignment is not None:
        params = with_projector(params, alignment.init(key))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), emas=emas)


def state_shardings(
    model: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    zero1: bool = False,
    alignment: Alignment | None = None,
    averages: int = 1,
) -> TrainState:
    """The sharding of every array of the state, by the logical axes of the parameters.

    Optimizer moments follow their parameter; scalars are replicated. With `zero1` the moments and the averages are also split
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
    return TrainState(step=replicated, params=params, opt_state=opt_state, emas=(without_projector(averaged),) * averages)


def abstract_state(
    model: Any, optimizer: optax.GradientTransformation, shardings: TrainState, *, alignment: Alignment | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing it: what a checkpoint is restored onto."""
    shapes = jax.eval_shape(
        functools.partial(create_state, model, optimizer, alignment=alignment, averages=len(shardings.emas)), jax.random.key(0)
    )
    return jax.tree.map(lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes, shardings)


def formats(arrays: TrainState) -> TrainState:
    """Shardings of the arrays, and on a TPU's mesh how each lies in memory: kernels [.., I, n, D] of n products as n [I, D].

    XLA chooses that itself where [n, D] would not fill tiles of eight rows, but not for n = 2, which it then moves about. The
    training step takes and returns the state so; `jax.device_put` lays it.
    """

    def each(array: Any) -> NamedSharding | Format:
        turns = array.ndim > 2 and array.shape[-2] < _TILE <= array.shape[-3]
        if not turns or target.platform() != "tpu":
            return array.sharding
        *lead, i, n, d = range(array.ndim)
        return Format(Layout(major_to_minor=(*lead, n, i, d)), array.sharding)

    return jax.tree.map(each, arrays)


def init_sharded(
    model: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: TrainState,
    *,
    alignment: Alignment | None = None,
) -> TrainState:
    """`create_state` compiled so that every array is born where `shardings` puts it; same values on every mesh."""
    options = {"alignment": alignment, "averages": len(shardings.emas)}
    once = target.once_options(shardings.step.mesh.devices.flat[0].platform)
    create = jax.jit(
        functools.partial(create_state, model, optimizer, **options), out_shardings=shardings, compiler_options=once
    )
    return create(jax.random.key(seed))


def with_first_weights(state: TrainState, params: Params, shardings: TrainState) -> TrainState:
    """The state at step 0 with other weights, in its averages too; `params` may be host arrays."""
    state = state.replace(params=jax.device_put(params, shardings.params))
    emas = (jax.device_put(state.weights, place, may_alias=False) for place in shardings.emas)
    return state.replace(emas=tuple(emas))


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
