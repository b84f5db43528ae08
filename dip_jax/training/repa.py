"""Representation alignment beside the flow loss (REPA, Yu et al. 2024; appendix C of the paper).

    loss = mean |v_hat - v|^2 + w mean over tokens of (1 - cos(project(s_k), y))        (1)

with s_k the tokens after block k and y those of a frozen DINOv2 that sees the clean image. The projector is trained by the same
optimizer and lies under `PROJECTOR` beside the model's own parts; the average has none, nor has what `load` returns.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from dip_jax import config
from dip_jax.checkpoints import teacher
from dip_jax.errors import UserError
from dip_jax.models import alignment, dinov2
from dip_jax.runtime import sharding
from dip_jax.runtime.storage import file_digest
from dip_jax.typing import Images, Params, PRNGKey, Tokens

PROJECTOR = "projector"
_STREAM = 2  # of the projector's first weights, beside the training noise's 1
ASSUMED = dinov2.DinoV2(width=768, depth=12)  # ViT-B/14, where a plan is made without its file


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What the second term of equation (1) needs beside arrays. Hashable, so that it can be a static argument."""

    options: config.Repa
    encoder: dinov2.DinoV2
    projector: alignment.Projector

    def init(self, key: PRNGKey) -> Params:
        """The projector's parameters, float32; drawn from a stream of their own, so that the model's are what they were."""
        return self.projector.init(jax.random.fold_in(key, _STREAM))

    def loss(self, projector: Params, tokens: Tokens, frozen: Params, image: Images) -> Float[Array, ""]:
        """The second term without its weight, float32 in [0, 2]; `image` is clean, in [-1, 1]."""
        y = dinov2.patch_tokens(self.encoder, frozen, image, grid=self.projector.grid, dtype=self.projector.dtype)
        y = jax.lax.stop_gradient(y)
        if self.options.spatial_norm:
            y = alignment.spatial_norm(y)
        return alignment.alignment_loss(self.projector.apply(projector, tokens), y)


def align(options: config.Repa, model: config.Model, encoder: dinov2.DinoV2 = ASSUMED) -> Alignment | None:
    """The alignment that a config asks for; None where its weight is 0.

    Raises:
        UserError: if the model has no such block, or too few tokens to normalise over.
    """
    if not options.weight:
        return None
    if options.layer > model.depth:
        raise UserError(
            f"repa.layer={options.layer} is no block of a model with model.depth={model.depth}: use 1..{model.depth}"
        )
    grid = (model.image_size[0] // model.patch_size, model.image_size[1] // model.patch_size)
    if options.spatial_norm and grid == (1, 1):
        raise UserError(
            "repa.spatial_norm normalises over the tokens of an image, and here is one: set repa.spatial_norm=False"
        )
    projector = alignment.Projector(options.projector, model.width, encoder.width, grid, model.dtype)
    return Alignment(options, encoder, projector)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The opened file of a run's teacher.

    Attributes:
        alignment: what the step does with it.
        params: float32, in host memory.
        digest: SHA-256 of the file; a checkpoint remembers it, not the weights.
    """

    alignment: Alignment
    params: Params
    digest: str


def open_teacher(options: config.Repa, model: config.Model, *, known: str | None = None) -> Teacher | None:
    """`align`, and the teacher from the user's file; None where the weight is 0. Nothing is compiled.

    Args:
        known: digest of the file that a checkpoint was trained with.

    Raises:
        UserError: as `align`; or the file is missing, holds no such network, or is another one than before.
    """
    if align(options, model) is None:
        return None
    if not options.encoder:
        raise UserError(f"repa.weight={options.weight} needs repa.encoder: {teacher.WHAT_IT_IS}")
    encoder, params = teacher.load_teacher(options.encoder)
    digest = file_digest(options.encoder)
    if known not in (None, digest):
        raise UserError(
            f"{options.encoder} has SHA-256 {digest}, and the checkpoint was trained with a teacher of {known}: name that file"
        )
    return Teacher(align(options, model, encoder), params, digest)


def with_projector(tree: Any, projector: Any) -> dict[str, Any]:
    """The model's tree (of parameters, axes, shardings) with the projector's beside it."""
    return {**tree, PROJECTOR: projector}


def without_projector(tree: Any) -> dict[str, Any]:
    """The model's own part of such a tree."""
    return {name: part for name, part in tree.items() if name != PROJECTOR}


def abstract_teacher(alignment: Alignment, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Params:
    """Shapes and shardings of the teacher's parameters: what the step is compiled for."""
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in dinov2.tensor_shapes(alignment.encoder).items()}
    params = dinov2.from_torch(tensors)[1]
    places = sharding.shardings(mesh, dinov2.logical_axes(), params)
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params, places)


def place_teacher(teacher: Teacher | None, mesh: jax.sharding.Mesh) -> tuple[tuple[Params, ...], Any]:
    """The teacher's parameters on the devices, as the step's last argument (none without a teacher), and their shardings."""
    if teacher is None:
        return (), None
    places = sharding.shardings(mesh, dinov2.logical_axes(), teacher.params)
    return (jax.device_put(teacher.params, places),), places
