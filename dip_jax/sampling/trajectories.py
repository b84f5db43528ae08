"""A model and its weights in, uint8 images out: batches of one compiled trajectory, spread over the devices.

Every batch has the same shape (the last is padded), so there is one compilation; a second call with the same options finds it,
and so does one with another guidance scale (but for 1, which is none). While a batch is fetched and written the next one runs.
Weights are converted to the compute dtype once for all batches, and what the network makes of times and labels is made before
the first step where it fits (`AHEAD_BYTES`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int, UInt8

from dip_jax import config, flow
from dip_jax.errors import UserError
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.sampling import guidance, sampler
from dip_jax.sampling.labels import check_labels
from dip_jax.typing import Params

# Per device, for the modulations of all steps; more would crowd out images, which gain more by a large batch.
AHEAD_BYTES = 2**30


@dataclass(frozen=True)
class Frames:
    """What the samples looked like on the way, uint8.

    Attributes:
        labels: class of each of the B samples.
        times: t of each of the F frames; 0 is noise.
        noisy: x_t.
        expected: the image that the network expects at the end, seen from each frame.
        images: the samples.
    """

    labels: Int[np.ndarray, "B"]
    times: Float[np.ndarray, "F"]
    noisy: UInt8[np.ndarray, "F B H W 3"]
    expected: UInt8[np.ndarray, "F B H W 3"]
    images: UInt8[np.ndarray, "B H W 3"]


@dataclass(frozen=True)
class Weaker:
    """A model that guides another one, and its weights."""

    model: dip.DiP
    params: Params

    def require_fit(self, model: dip.DiP) -> None:
        """Checks that it can guide.

        Raises:
            UserError: if it draws other classes or images of another size.
        """
        guide, guided = self.model.config, model.config
        for name, one, other in (
            ("classes", guide.num_classes, guided.num_classes),
            ("pixels", *("{}x{}".format(*each.image_size) for each in (guide, guided))),
        ):
            if one != other:
                raise UserError(
                    f"the guide has {one} {name}, the model {other}: a guide draws the same classes at the same size"
                )


def draw_batches(
    model: dip.DiP,
    params: Params,
    *,
    labels: Sequence[int] | np.ndarray,
    seed: int,
    options: config.Sample,
    mesh: jax.sharding.Mesh | None = None,
    only: Iterable[int] | None = None,
    guide: Weaker | None = None,
) -> Iterator[tuple[int, UInt8[np.ndarray, "B H W 3"]]]:
    """Draws one image per label, one batch ahead of the caller.

    Args:
        model, params: from `checkpoint.load` or `dip.build`.
        labels: N classes in [0, num_classes]; num_classes is the null class.
        seed: image i is a function of (seed, i, labels[i]) alone.
        options: solver, steps, guidance, images per batch.
        mesh: devices; by default this process's own. Where it spans several hosts, all call this and all get all images.
        only: the batches to draw; by default all.
        guide: a weaker model in the place of the unconditional half (autoguidance).

    Yields:
        (k, images): batch k holds the samples from k * options.batch_size on; the last may be shorter.

    Raises:
        UserError: for a label or seed out of range, before compiling; for images that are not finite.
    """
    labels = check_labels(labels, model)
    guidance.check_internal(options, model.config)
    size = options.batch_size
    mesh = mesh or sharding.make_mesh(config.Mesh(), jax.local_devices())
    static, weaker = {"model": model, "options": guidance.without_scale(options)}, _guiding(model, guide, mesh)
    scale = np.float32(options.guidance)
    rows = _rows(min(size, len(labels)), mesh)
    params = _ready(model, params, mesh)
    waiting: list[tuple[int, int, Any]] = []
    for number in range(-(-len(labels) // size)) if only is None else only:
        indices = np.arange(number * size, min((number + 1) * size, len(labels)))
        with jax.set_mesh(mesh):
            drawn = _draw(params, scale, *_place(seed, indices, labels[indices], rows=rows, mesh=mesh), **static, **weaker)
        waiting.append((number, len(indices), drawn))
        if len(waiting) > 1:
            yield _fetch(*waiting.pop(0))
    for drawn in waiting:
        yield _fetch(*drawn)


def draw_frames(
    model: dip.DiP,
    params: Params,
    *,
    labels: Sequence[int] | np.ndarray,
    seed: int,
    options: config.Sample,
    mesh: jax.sharding.Mesh | None = None,
    frames: int = 8,
    guide: Weaker | None = None,
) -> Frames:
    """The way from noise to image of a few samples, in one batch; arguments as `draw_batches`."""
    labels = check_labels(labels, model)
    guidance.check_internal(options, model.config)
    mesh = mesh or sharding.make_mesh(config.Mesh(), jax.local_devices())
    static = {"model": model, "options": guidance.without_scale(options), "frames": frames}
    scale, weaker = np.float32(options.guidance), _guiding(model, guide, mesh)
    params = _ready(model, params, mesh)
    count = len(labels)
    with jax.set_mesh(mesh):
        place = _place(seed, np.arange(count), labels, rows=_rows(count, mesh), mesh=mesh)
        times, noisy, expected, images = jax.tree.map(np.asarray, _draw_frames(params, scale, *place, **static, **weaker))
    return Frames(labels=labels, times=times, noisy=noisy[:, :count], expected=expected[:, :count], images=images[:count])


def lower_draw(model: dip.DiP, *, options: config.Sample, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The call that `draw_batches` makes for a full batch, on abstract arrays: for devices that are not there."""
    rows = NamedSharding(mesh, sharding.spec(("batch",)))
    shape = (_rows(options.batch_size, mesh),)
    whole = jax.eval_shape(model.init, jax.random.key(0))
    places = sharding.shardings(mesh, model.logical_axes(), whole)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(model.cast, whole), places
    )
    numbers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    scale, seed = (jax.ShapeDtypeStruct((), kind, sharding=NamedSharding(mesh, PartitionSpec())) for kind in ("f4", "u4"))
    with jax.set_mesh(mesh):
        return _draw.lower(params, scale, seed, numbers, numbers, model=model, options=guidance.without_scale(options))


def _ready(model: dip.DiP, params: Params, mesh: jax.sharding.Mesh) -> Params:
    """The weights on the devices, as the network's products read them."""
    placed = jax.tree.map(_spread, params, sharding.shardings(mesh, model.logical_axes(), params))
    with jax.set_mesh(mesh):
        return _cast(placed, model=model)


def _guiding(model: dip.DiP, guide: Weaker | None, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The arguments that a guide adds to `_draw`: none without one, whose program is then the same."""
    if guide is None:
        return {}
    guide.require_fit(model)
    return {"weaker": _ready(guide.model, guide.params, mesh), "guide": guide.model}


def _spread(array: jax.Array, place: NamedSharding) -> jax.Array:
    if place.is_fully_addressable or not array.is_fully_addressable:
        return jax.device_put(array, place)
    whole = np.asarray(array)  # every host has all of it, and puts up the parts that its devices hold
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def _rows(count: int, mesh: jax.sharding.Mesh) -> int:
    """Rows that are compiled for `count` samples: the same number on every device."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // ways) * ways


def _place(seed: int, indices: np.ndarray, labels: np.ndarray, *, rows: int, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Seed, and indices and labels padded to `rows` (with copies of the last), on the devices."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie in 0..{2**32 - 1}")
    placement = NamedSharding(mesh, sharding.spec(("batch",)))

    def put(values: np.ndarray) -> jax.Array:
        padded = np.pad(values.astype(np.int32), (0, rows - len(values)), mode="edge")
        return jax.make_array_from_callback(padded.shape, placement, lambda index: padded[index])

    return np.uint32(seed), put(indices), put(labels)


def _fetch(number: int, count: int, drawn: tuple[jax.Array, jax.Array]) -> tuple[int, np.ndarray]:
    images, finite = (np.asarray(array)[:count] for array in drawn)
    if not finite.all():
        raise UserError(
            f"{(~finite).sum()} of {count} samples of batch {number} hold NaN or infinity: the weights are damaged or the "
            "training diverged; try an earlier checkpoint"
        )
    return number, images


@functools.partial(jax.jit, static_argnames="model")
def _cast(params, *, model):
    return model.cast(params)


def _ahead(model, params, labels, options):
    """What makes the modulations of all steps at once; None where one device's part would not fit."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = labels.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"]) + 1  # and that of no class
    one = jax.eval_shape(
        model.modulations, params, jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    )
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one)) * rows * sampler.nfe(options)[0]
    return functools.partial(model.modulations, params) if needed <= AHEAD_BYTES else None


def _velocity(params, model, options):
    """What the network of a model says, as a velocity."""
    network = model.config
    if network.prediction in ("x", "asym"):
        # The last step must land on the predicted image: a floor above its 1 - t would leave noise in every sample.
        network = dataclasses.replace(network, t_clip=min(network.t_clip, 1 - float(sampler.time_grid(options)[-2])))
        model = dip.DiP(network)  # asym reads the floor too

    def predict(x_t, t, y, *ahead):
        if options.internal_guidance == 1:
            return flow.to_velocity(model.apply(params, x_t, t, y, *ahead), x_t, t, model=network)
        said = model.apply_all(params, x_t, t, y, *ahead)
        final, early = (flow.to_velocity(each, x_t, t, model=network) for each in (said.prediction, said.internal))
        return guidance.internal(final, early, t, sample=options)

    return predict


def _arguments(params, scale, seed, indices, labels, model, options, weaker, guide):
    """(predict, the arguments that `sampler.draw` and `sampler.draw_trajectory` share)."""
    shared = {"image_shape": (*model.config.image_size, 3), "null_label": model.config.num_classes}
    shared |= {"sample": options, "scale": scale, "ahead": _ahead(model, params, labels, options)}
    if guide is not None:
        shared["weaker"] = _velocity(weaker, guide, dataclasses.replace(options, internal_guidance=1.0))
    return _velocity(params, model, options), {"key": jax.random.key(seed), "indices": indices, "labels": labels, **shared}


@functools.partial(jax.jit, static_argnames=("model", "options", "guide"))
def _draw(params, scale, seed, indices, labels, *, model, options, weaker=None, guide=None):
    predict, arguments = _arguments(params, scale, seed, indices, labels, model, options, weaker, guide)
    x = sampler.draw(predict, **arguments)
    drawn = sampler.to_uint8(x), jnp.isfinite(x).all(axis=(1, 2, 3))
    drawn = jax.lax.with_sharding_constraint(drawn, sharding.spec(("batch",)))
    drawn = jax.lax.optimization_barrier(drawn)  # else compilers gather float32, and convert everywhere
    return jax.lax.with_sharding_constraint(drawn, PartitionSpec())  # every host reads all of it


@functools.partial(jax.jit, static_argnames=("model", "options", "frames", "guide"))
def _draw_frames(params, scale, seed, indices, labels, *, model, options, frames, weaker=None, guide=None):
    predict, arguments = _arguments(params, scale, seed, indices, labels, model, options, weaker, guide)
    way = sampler.draw_trajectory(predict, **arguments, frames=frames)
    noisy, expected, images = (sampler.to_uint8(x) for x in (way.noisy, way.expected, way.images))
    return jax.lax.with_sharding_constraint((way.times, noisy, expected, images), PartitionSpec())
