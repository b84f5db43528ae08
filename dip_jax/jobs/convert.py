"""Turn published PyTorch weights into a checkpoint that sample, evaluate and dip_jax.load read.

Examples:
  python -m dip_jax convert --from=pixnerd --checkpoint=pixnerd_xl.ckpt --out=runs/pixnerd
  python -m dip_jax convert --from=ddt --checkpoint=dit_xl.safetensors --image_size=256 --out=runs/dit

pixnerd: PixNerd's class-conditional pixel models, which become DiP with the coordinate-MLP head.
ddt: the single-stack DiT of the DDT repository on pixels, which becomes DiT-only; it can start a DiP run (train --init_from).
Sizes are read from the tensors. Where a Lightning checkpoint holds averaged weights (ema_denoiser.), those are taken. Nothing
that the file pickles is executed; a missing, extra or mis-shaped tensor is an error that lists them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags as absl_flags
from etils import epath

from dip_jax import config
from dip_jax.checkpoints import checkpoint as checkpoints
from dip_jax.checkpoints import torch_file
from dip_jax.errors import UserError
from dip_jax.typing import Params

_PREFIXES = ("ema_denoiser._orig_mod.", "ema_denoiser.", "denoiser._orig_mod.", "denoiser.", "_orig_mod.")
_LISTED = 8  # names in an error message


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of the tensors tell about the network."""

    depth: int  # L
    width: int  # D
    num_heads: int  # K
    patch_size: int  # P
    num_classes: int
    head_width: int = 64  # pixnerd: width of the decoder
    head_depth: int = 4  # pixnerd: blocks of the decoder


class _Reader:
    """Hands out tensors by name and expected shape, and remembers what did not fit and what nobody asked for."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = dict(tensors)
        self._wrong: list[str] = []

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        tensor = self._tensors.pop(name, None)
        if tensor is not None and tensor.shape == shape:
            return np.asarray(tensor, np.float32)
        found = "missing" if tensor is None else f"{list(tensor.shape)} instead of {list(shape)}"
        self._wrong.append(f"{name}: {found}")
        return np.zeros(shape, np.float32)

    def finish(self) -> None:
        wrong = self._wrong + [f"{name}: extra" for name in sorted(self._tensors)]
        if wrong:
            more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            raise UserError(f"{len(wrong)} tensors do not fit the network: {'; '.join(wrong[:_LISTED])}{more}")


Take = Callable[..., np.ndarray]


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    absl_flags.DEFINE_enum("from", None, list(SOURCES), "where the weights come from", flag_values=flags, required=True)
    absl_flags.DEFINE_string("checkpoint", None, ".ckpt, .pth, .pt or .safetensors file", flag_values=flags, required=True)
    absl_flags.DEFINE_string("out", None, "directory to write the checkpoint to", flag_values=flags, required=True)
    absl_flags.DEFINE_integer(
        "image_size", 256, "side of the images the weights are for; tensors do not tell it", 1, flag_values=flags
    )


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    path = convert(flags["from"].value, checkpoint=flags.checkpoint, out=flags.out, image_size=flags.image_size)
    print(f"{path}: ready for sample, evaluate and dip_jax.load")


def convert(source: str, *, checkpoint: epath.PathLike, out: epath.PathLike, image_size: int = 256) -> epath.Path:
    """Reads a PyTorch file and writes our checkpoint; returns the step directory.

    Args:
        source: row of SOURCES.
        checkpoint: the file.
        out: the directory to make.
        image_size: side of the images; a multiple of the patch size.

    Raises:
        UserError: for an unreadable file, tensors that do not fit, an image size that the patch size does not divide, or an
            `out` that holds a checkpoint already.
    """
    try:
        model, params = from_tensors(torch_file.read_tensors(checkpoint), source=source, image_size=image_size)
    except UserError as error:
        raise error if str(error).startswith(str(checkpoint)) else UserError(f"{checkpoint}: {error}") from None
    return checkpoints.write_weights(out, params, config=config.Config(model=model))


def from_tensors(tensors: dict[str, np.ndarray], *, source: str, image_size: int = 256) -> tuple[config.Model, Params]:
    """Named tensors of a PyTorch network -> the model section and its parameters.

    Raises:
        UserError: listing every missing, extra or mis-shaped tensor.
    """
    tensors = _without_prefix(tensors)
    family = SOURCES[source]
    sizes = _read_sizes(tensors, family)
    take = _Reader(tensors)
    params = family.build(take, sizes)
    take.finish()
    return family.model(sizes, image_size), params


def tensor_shapes(source: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `from_tensors` expects of a network of these sizes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def take(name: str, *shape: int) -> np.ndarray:
        shapes[name] = shape
        return np.zeros(shape, np.float32)

    SOURCES[source].build(take, sizes)
    return shapes


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's own tensors: the first prefix that is there wins, what lies outside it is another module's."""
    for prefix in _PREFIXES:
        if found := {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}:
            return found
    return tensors


@dataclasses.dataclass(frozen=True)
class _Family:
    """One kind of PyTorch network.

    Attributes:
        embed: name of the patch embedding's weight [D, 3 P^2].
        build: takes tensors by name and gives our parameters.
        model: sizes and image side -> our config section.
    """

    embed: str
    build: Callable[[Take, Sizes], dict[str, Any]]
    model: Callable[[Sizes, int], config.Model]


def _read_sizes(tensors: dict[str, np.ndarray], family: _Family) -> Sizes:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != rank:
            found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise UserError(f"tensor {name}, which tells the sizes, {found}: is --from right, and the file complete?")
        return tensors[name].shape

    width, columns = shape(family.embed, 2)
    patch_size = math.isqrt(columns // 3)
    if 3 * patch_size**2 != columns:
        raise UserError(
            f"{family.embed} has {columns} columns, not 3 P^2: these are not weights for pixels (latent models do not fit)"
        )
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.") and name.split(".")[1].isdigit()}
    decoder = {int(name.split(".")[1]) for name in tensors if ".param_generator1." in name}
    (head_dim,) = shape("blocks.0.attn.q_norm.weight", 1)
    rows = shape("y_embedder.embedding_table.weight", 2)[0]
    if width % head_dim:
        raise UserError(f"blocks.0.attn.q_norm.weight has {head_dim} entries, which do not divide the width {width}")
    sizes = Sizes(len(blocks - decoder), width, width // head_dim, patch_size, rows - 1, head_depth=len(decoder))
    if family is SOURCES["pixnerd"]:
        sizes = dataclasses.replace(sizes, head_width=shape("x_embedder.embedder.0.weight", 2)[0])
    return sizes


def _transformer(take: Take, sizes: Sizes, *, embed: str) -> dict[str, Any]:
    """What the families share: patch embedding, condition, blocks."""
    d, p = sizes.width, sizes.patch_size
    name = embed.removesuffix(".weight")
    return {
        "patch_embed": {"linear": {"kernel": _pixel_rows(take(embed, d, 3 * p * p).T, p), "bias": take(f"{name}.bias", d)}},
        "condition": {
            "time": {"in": _linear(take, "t_embedder.mlp.0", 256, d), "out": _linear(take, "t_embedder.mlp.2", d, d)},
            "label": {"table": take("y_embedder.embedding_table.weight", sizes.num_classes + 1, d)},
        },
        "blocks": _stacked([_block(take, f"blocks.{i}", sizes) for i in range(sizes.depth)]),
    }


def _block(take: Take, name: str, sizes: Sizes) -> dict[str, Any]:
    d, heads = sizes.width, sizes.num_heads
    inner, head_dim = int(2 * int(4 * d) / 3), d // heads
    # The sources rotate neighbouring channels, we rotate the two halves of a head: even channels first, then odd ones.
    order = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    qkv = take(f"{name}.attn.qkv.weight", 3 * d, d).reshape(3, heads, head_dim, d)
    qkv = np.concatenate([qkv[:2, :, order], qkv[2:]]).reshape(3, d, d)
    return {
        "norm1": {"scale": take(f"{name}.norm1.weight", d)},
        "norm2": {"scale": take(f"{name}.norm2.weight", d)},
        "attention": {
            "qkv": {"kernel": qkv.transpose(2, 0, 1)},
            "q_norm": {"scale": take(f"{name}.attn.q_norm.weight", head_dim)[order]},
            "k_norm": {"scale": take(f"{name}.attn.k_norm.weight", head_dim)[order]},
            "proj": _linear(take, f"{name}.attn.proj", d, d),
        },
        "mlp": {
            "gate_up": {"kernel": np.stack([take(f"{name}.mlp.{w}.weight", inner, d).T for w in ("w1", "w3")], axis=1)},
            "down": {"kernel": take(f"{name}.mlp.w2.weight", d, inner).T},
        },
        "modulation": _linear(take, f"{name}.adaLN_modulation.0", d, 6, d),
    }


def _linear(take: Take, name: str, fan_in: int, *features: int) -> dict[str, np.ndarray]:
    rows = math.prod(features)
    kernel = take(f"{name}.weight", rows, fan_in).T.reshape(fan_in, *features)
    return {"kernel": kernel, "bias": take(f"{name}.bias", rows).reshape(features)}


def _pixel_rows(rows: np.ndarray, p: int) -> np.ndarray:
    """Rows [3 P P, ...] in the order (channel, y, x) -> the same rows in ours, (y, x, channel)."""
    order = np.arange(3 * p * p).reshape(3, p, p).transpose(1, 2, 0).ravel()
    return rows[order]


def _stacked(layers: list[dict[str, Any]]) -> dict[str, Any]:
    first = layers[0]
    return {
        key: _stacked([layer[key] for layer in layers]) if isinstance(first[key], dict) else np.stack([x[key] for x in layers])
        for key in first
    }


def _pixnerd(take: Take, sizes: Sizes) -> dict[str, Any]:
    d, w = sizes.width, sizes.head_width
    head: dict[str, Any] = {"embed": _linear(take, "x_embedder.embedder.0", 3 + 64, w)}
    for i in range(sizes.head_depth):
        name = f"blocks.{sizes.depth + i}"
        head[f"block_{i}"] = {
            "generator": _linear(take, f"{name}.param_generator1.0", d, 2, 2 * w * w),
            "norm": {"scale": take(f"{name}.norm.weight", w)},
        }
    head["norm"] = {"scale": take("final_layer.norm.weight", w)}
    head["out"] = _linear(take, "final_layer.linear", w, 3)
    return _transformer(take, sizes, embed=SOURCES["pixnerd"].embed) | {"head": head}


def _ddt(take: Take, sizes: Sizes) -> dict[str, Any]:
    d, p = sizes.width, sizes.patch_size
    linear = {
        "kernel": _pixel_rows(take("final_layer.linear.weight", 3 * p * p, d), p).T,
        "bias": _pixel_rows(take("final_layer.linear.bias", 3 * p * p), p),
    }
    final = {"modulation": _linear(take, "final_layer.adaLN_modulation.0", d, 2, d), "linear": linear}
    return _transformer(take, sizes, embed=SOURCES["ddt"].embed) | {"final": final}


def _model(sizes: Sizes, image_size: int, **head: Any) -> config.Model:
    return config.Model(
        depth=sizes.depth,
        width=sizes.width,
        num_heads=sizes.num_heads,
        patch_size=sizes.patch_size,
        num_classes=sizes.num_classes,
        image_size=(image_size, image_size),
        **head,
    )


def _pixnerd_model(sizes: Sizes, image_size: int) -> config.Model:
    return _model(sizes, image_size, head="coord_mlp", head_width=sizes.head_width, head_depth=sizes.head_depth)


def _ddt_model(sizes: Sizes, image_size: int) -> config.Model:
    return _model(sizes, image_size, head="none")


SOURCES = {
    "pixnerd": _Family("s_embedder.proj.weight", _pixnerd, _pixnerd_model),
    "ddt": _Family("x_embedder.proj.weight", _ddt, _ddt_model),
}
