"""What a model costs: multiply-adds of the forward pass, counted by hand, and the activations that the backward pass reads.

XLA's own count takes a scanned block once, so MFU is computed from this one. FLOPs are 2 per multiply-add, matrix products and
convolutions only; the U-Net is counted as it runs on many patches at once (`models/folding.py`), the composing of its kernels
left out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import dinov2, folding
from dip_jax.models.alignment import Projector
from dip_jax.models.detailers import CONTEXT, unet_depth
from dip_jax.runtime import target

_MANY = 1024  # images with which every kernel of the U-Net is composed


def forward_flops(model: config.Model) -> dict[str, int]:
    """FLOPs of one forward pass of one image, by part of the network; 0 for a part that it does not have.

    Raises:
        UserError: for a head that nobody has counted.
    """
    if model.head not in HEAD_PRODUCTS:
        raise UserError(
            f"model.head={model.head!r} has no cost: add its multiply-adds to HEAD_PRODUCTS of dip_jax/models/cost.py"
        )
    d, p = model.width, model.patch_size
    n = model.image_size[0] * model.image_size[1] // p**2
    inner = int(2 * int(4 * d) / 3)
    injected = model.placement in ("intermediate", "hybrid")
    before = model.inject_after if injected else model.depth
    has_final = model.head == "none" or model.placement in ("intermediate", "residual")

    def stack(name: str, first: int, last: int) -> dict[str, int]:
        def layers(count: int, tokens: int) -> int:
            return count * (tokens * (4 * d * d + 3 * d * inner) + 2 * tokens * tokens * d + 6 * d * d)

        plain = min(max(model.context_start - first, 0), last - first)
        return {name: layers(plain, n), f"{name}_context": layers(last - first - plain, n + model.context_tokens)}

    head = HEAD_PRODUCTS[model.head](model, n)
    products = {
        "condition": 256 * d + d * d,
        "patch_embed": n * 3 * p * p * d,
        **stack("blocks", 0, before),
        **stack("blocks_after", before, model.depth),
        "inject": n * 3 * p * p * d if injected else 0,
        "inject_head": head if injected else 0,
        "internal": n * d * 3 * p * p + 2 * d * d if model.internal else 0,
        "head": 0 if model.placement == "intermediate" else head,
        "subspace": (1 + model.internal) * 2 * n * 3 * p * p * model.subspace_rank if model.prediction == "asym" else 0,
        "final": n * d * 3 * p * p + 2 * d * d if has_final else 0,
    }
    return {part: 2 * count for part, count in products.items()}


def _convolution(side: int, fan_in: int, features: int) -> int:
    """3x3 on a map of this side; dense products on the smallest maps."""
    return side**4 * fan_in * features if side <= folding.DENSE_SIDE else 9 * side * side * fan_in * features


def _unet(model: config.Model, patches: int) -> int:
    depth, base, p = unet_depth(model), model.head_width or 64, model.patch_size
    widths, count, fan_in = [base * 2**i for i in range(depth)], 0, 3
    for i, width in enumerate(widths):
        count += _convolution(p // 2**i, fan_in, width)
        fan_in = width
    count += (p // 2**depth) ** 2 * widths[-1] ** 2 + model.width * widths[-1]
    for i, width in enumerate(widths):
        side, features = p // 2**i, widths[max(i - 1, 0)]
        low = side // 2
        count += (low * low * side * side if low <= folding.DENSE_SIDE else 16 * low * low) * width * features
        count += _convolution(side, width, features)
    return patches * (count + p * p * base * 3)


def _mlp(model: config.Model, patches: int) -> int:
    pixels = 3 * model.patch_size**2
    width = model.head_width or model.width + pixels
    hidden = (model.head_depth or 1) - 1
    return patches * ((model.width + pixels) * width + hidden * width * width + width * pixels)


def _coordinate_mlp(model: config.Model, patches: int) -> int:
    w, area = model.head_width or 64, model.patch_size**2
    block = model.width * 4 * w * w + area * 4 * w * w
    return patches * ((model.head_depth or 4) * block + area * w * (3 + 64 + 3))


def _attention(model: config.Model, patches: int) -> int:
    w, area = model.head_width or 64, model.patch_size**2
    cross = 2 * area * w * w + CONTEXT * 2 * w * w + 2 * area * CONTEXT * w
    own = 4 * area * w * w + 2 * area * area * w
    block = cross + own + area * 3 * w * int(8 * w / 3)
    return patches * (model.width * CONTEXT * w + (model.head_depth or 2) * block + 2 * area * w * 3)


# Multiply-adds of a head over all patches of one image; a row for every row of `models.detailers.HEADS`.
HEAD_PRODUCTS: dict[str, Callable[[config.Model, int], int]] = {
    "unet": _unet,
    "mlp": _mlp,
    "coord_mlp": _coordinate_mlp,
    "attention": _attention,
    "none": lambda model, patches: 0,
}


def teacher_flops(encoder: dinov2.DinoV2, *, image_size: tuple[int, int], grid: tuple[int, int]) -> int:
    """FLOPs of the teacher of representation alignment for one image, its resize included; 46 G for ViT-B at 16 x 16 tokens."""
    (height, width), (h, w), d = image_size, (dinov2.PATCH * grid[0], dinov2.PATCH * grid[1]), encoder.width
    resize = 3 * (h * height * width + h * w * width)
    n = grid[0] * grid[1] + 1
    return 2 * (resize + 3 * h * w * d + encoder.depth * (n * 12 * d * d + 2 * n * n * d))


def projector_flops(projector: Projector) -> int:
    """FLOPs of one forward pass of the projector for one image; training runs three times as many."""
    d, (h, w) = projector.width, projector.grid
    token = 9 * d * projector.features if projector.kind == "conv" else 2 * d * d + d * projector.features
    return 2 * h * w * token


def activation_bytes_per_image(model: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass, per image, under the model's rematerialisation.

    Exact for what JAX saves, but for the softmax's sums on a TPU (abstract tracing of two batch sizes; what does not grow with
    the batch is parameters); what XLA needs while it computes comes on top: `recomputed_bytes_per_image`.
    """
    return _saved(model, _MANY + 1) - _saved(model, _MANY)


def head_bytes_per_image(model: Any) -> int:
    """Bytes that the head's gradient needs of its activations, per image, whether they are kept or made again."""
    if model.config.head == "none":
        return 0
    kept, again = (_saved(_changed(model, head_remat=remat), _MANY) for remat in (False, True))
    return (kept - again) // _MANY


def recomputed_bytes_per_image(model: Any) -> dict[str, int]:
    """Bytes that the backward pass makes again and holds for a while, per image: of the "head", and of one "block"."""
    block = 0
    if model.config.remat != "none":
        bare = {"head": "none", "placement": "post_hoc", "depth": 1, "inject_after": 1, "internal": False, "context_tokens": 0}
        one = _changed(model, **bare)
        block = _saved(_changed(one, remat="none"), _MANY) - _saved(one, _MANY)
    return {"head": head_bytes_per_image(model) if model.config.head_remat else 0, "block": block // _MANY}


def _changed(model: Any, **fields: Any) -> Any:
    return type(model)(dataclasses.replace(model.config, **fields))


@functools.lru_cache(maxsize=8)
def _saved(model: Any, batch: int) -> int:
    """Bytes that are kept for the backward pass of so many images, weights among them."""
    h, w = model.config.image_size
    x, t = jax.ShapeDtypeStruct((batch, h, w, 3), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)
    with target.everywhere():
        params = jax.eval_shape(model.init, jax.random.key(0))
        residuals = jax.eval_shape(lambda p, *rest: jax.vjp(lambda q: model.apply(q, *rest), p)[1], params, x, t, y)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
