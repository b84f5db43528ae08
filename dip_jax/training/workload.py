"""What a training run asks of its devices, known before anything is compiled, and the lines that say so at its start."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from dip_jax import config
from dip_jax.models import cost, dip
from dip_jax.reporting import console
from dip_jax.runtime import writers
from dip_jax.training.repa import Alignment, abstract_teacher
from dip_jax.training.state import TrainState, abstract_state


def alignment_flops(alignment: Alignment, image_size: tuple[int, int]) -> dict[str, int]:
    """FLOPs per image that alignment adds to a training step: the teacher runs forward only, the projector is trained."""
    teacher = cost.teacher_flops(alignment.encoder, image_size=image_size, grid=alignment.projector.grid)
    return {"teacher": teacher, "projector": 3 * cost.projector_flops(alignment.projector)}


def step_flops(model: config.Model, alignment: Alignment | None) -> int:
    """FLOPs per image of a training step: three times the forward pass, and what alignment adds.

    What rematerialisation computes again is left out, so that the share of the peak (MFU) counts useful work alone.
    """
    added = alignment_flops(alignment, model.image_size) if alignment else {}
    return 3 * sum(cost.forward_flops(model).values()) + sum(added.values())


def planned_bytes(model: dip.DiP, state: TrainState, teacher: Any, *, images: int, accumulate: int = 1) -> dict[str, int]:
    """Bytes per device by what holds them.

    Args:
        model: what is trained.
        state: shapes, dtypes and shardings, as `state.abstract_state`.
        teacher: the same of the teacher's parameters; an empty tree where there is none.
        images: that a device works on at a time.
        accumulate: micro-batches per step.

    Returns:
        params, optimizer, ema (of all averages), gradients, teacher (where there is one), activations (see
        `cost.activation_bytes_per_image`), and what the backward pass needs beside them, `_workspace`.
    """
    params = _bytes(state.params)
    # In the blocks' own type until the update reads them; micro-batches are summed in float32.
    gradients = params // 2 if _halves(model) and accumulate == 1 else params
    activations = images * cost.activation_bytes_per_image(model)
    return {
        "params": params,
        "optimizer": _bytes(state.opt_state),
        "ema": _bytes(state.emas),
        "gradients": gradients,
        **({"teacher": _bytes(teacher)} if teacher else {}),
        "activations": activations,
        "workspace": _workspace(model, params=params, gradients=gradients, images=images),
    }


def _workspace(model: dip.DiP, *, params: int, gradients: int, images: int) -> int:
    """Bytes beside state, gradients and activations at the fuller of two moments; docs/scaling.md has compilers' own words.

    The weights are there a second time in the type that products read. While the head is differentiated, its activations are
    made again, some five eighths of them at a time, but there are no gradients yet; while a block is, its own and their
    gradients, and what a head after the blocks had kept is gone.
    """
    again, cast = cost.recomputed_bytes_per_image(model), params // 2 if _halves(model) else 0
    kept = not model.config.head_remat and model.config.placement in ("post_hoc", "residual")
    gone = images * cost.head_bytes_per_image(model) if kept else 0
    return cast + max(images * again["head"] * 5 // 8 - gradients, 2 * images * again["block"] - gone, 0)


def _halves(model: dip.DiP) -> bool:
    """Whether products read two bytes where the state has four."""
    return model.config.dtype == "bfloat16"


def images_at_a_time(options: config.Config, mesh: Mapping[str, int]) -> int:
    """Images that a device works on at once, by the sizes of the mesh's axes."""
    return options.data.batch_size // (mesh["data"] * mesh["fsdp"] * options.optim.accumulate)


def count(tree: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def describe_place(mesh: jax.sharding.Mesh) -> str:
    """The devices, the mesh that they make, and the hosts."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    hosts = jax.process_count()
    return f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes}, {hosts} process{'es' * (hosts > 1)}"


def describe_work(
    options: config.Config,
    model: dip.DiP,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    *,
    alignment: Alignment | None,
    mesh: jax.sharding.Mesh,
) -> str:
    """Lines with parameters and FLOPs, the bytes per device that are planned for, and what comes next."""
    arrays = abstract_state(model, optimizer, shardings, alignment=alignment)
    teacher = abstract_teacher(alignment, mesh) if alignment else {}
    images = images_at_a_time(options, mesh.shape)
    parts = planned_bytes(model, arrays, teacher, images=images, accumulate=options.optim.accumulate)
    planned = ", ".join(f"{name} {console.size(size)}" for name, size in parts.items())
    whole_size = console.size(sum(parts.values()))
    in_head = sum(count(part) for name, part in arrays.ema.items() if name in ("head", "inject_head"))
    forward, whole = sum(cost.forward_flops(options.model).values()), step_flops(options.model, alignment)
    return (
        f"model: {count(arrays.ema):,} parameters, {in_head:,} in the head; "
        f"GFLOP per image: {forward / 1e9:.4g} forward, {whole / 1e9:.4g} in training\n"
        f"memory planned per device, {images} image{'s' * (images > 1)} at a time: {whole_size} ({planned})\n"
        f"compiling; then {writers.progress_rhythm()}, and rows of metrics.jsonl by train.log_every={options.train.log_every}"
    )


def _bytes(tree: Any) -> int:
    """Of what one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
