"""Which tensor of the published PyTorch networks holds which of our parameters: one table per network.

A row is read in both directions. Every rearrangement is a reshape and a transpose, so going there and back changes no bit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dip_jax import config

_DCT = 64  # values of the coordinate MLP's basis per pixel
_UNET = 64  # widths of the official U-Net's first and last stage
_STAGES = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """ours[path][at] = theirs[rows].reshape(split).transpose(axes), in the shape of the left side.

    Attributes:
        path: of one of our parameters, such as "blocks/attention/qkv/kernel".
        split, axes: the rearrangement.
        at: the part of our parameter; all by default.
        rows: the part of their tensor along its first axis, as (start, stop); all by default.
    """

    path: str
    split: tuple[int, ...]
    axes: tuple[int, ...]
    at: tuple[int | slice, ...] = ()
    rows: tuple[int, int | None] = (0, None)

    def read(self, theirs: np.ndarray, ours: dict[str, np.ndarray]) -> None:
        target = ours[self.path][self.at]
        target[...] = theirs[slice(*self.rows)].reshape(self.split).transpose(self.axes).reshape(target.shape)

    def write(self, ours: dict[str, np.ndarray], theirs: np.ndarray) -> None:
        target = theirs[slice(*self.rows)]
        value = ours[self.path][self.at].reshape([self.split[axis] for axis in self.axes])
        target[...] = value.transpose(np.argsort(self.axes)).reshape(target.shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """One published PyTorch network.

    Attributes:
        mark: a tensor that it alone has.
        embed: its patch embedding's weight [D, 3 P^2].
        fields: the model options that it has; with those that all share, what a checkpoint needs to become one.
        head: the rows beyond embedding, condition and blocks.
    """

    mark: str
    embed: str
    fields: dict[str, Any]
    head: Callable[[config.Model], Iterator[Row]]


def rows(network: Network, model: config.Model) -> Iterator[Row]:
    """The whole table, in the PyTorch network's order, for a model of ours that has the network's fields."""
    d, p = model.width, model.patch_size
    embed = network.embed.removesuffix(".weight")
    # Their pixels run (channel, y, x), ours (y, x, channel).
    yield Row(network.embed, (d, 3 * p * p), (Piece("patch_embed/linear/kernel", (d, 3, p, p), (2, 3, 1, 0)),))
    yield _same(f"{embed}.bias", "patch_embed/linear/bias", d)
    yield from _linear("t_embedder.mlp.0", "condition/time/in", 256, d)
    yield from _linear("t_embedder.mlp.2", "condition/time/out", d, d)
    yield _same("y_embedder.embedding_table.weight", "condition/label/table", model.num_classes + 1, d)
    for i in range(model.depth):
        yield from _block(model, i)
    yield from network.head(model)


def _block(model: config.Model, i: int) -> Iterator[Row]:
    d, k, name = model.width, model.num_heads, f"blocks.{i}"
    inner, half = int(2 * int(4 * d) / 3), d // k // 2
    every = slice(None)
    # The sources rotate neighbouring channels, we rotate the two halves of a head: (pair, 2) becomes (2, pair) in q and k.
    qk = Piece("blocks/attention/qkv/kernel", (2, k, half, 2, d), (4, 0, 1, 3, 2), at=(i, every, slice(2)), rows=(0, 2 * d))
    v = Piece("blocks/attention/qkv/kernel", (d, d), (1, 0), at=(i, every, 2), rows=(2 * d, None))
    yield _same(f"{name}.norm1.weight", "blocks/norm1/scale", d, at=(i,))
    yield Row(f"{name}.attn.qkv.weight", (3 * d, d), (qk, v))
    for norm in ("q_norm", "k_norm"):
        scale = Piece(f"blocks/attention/{norm}/scale", (half, 2), (1, 0), at=(i,))
        yield Row(f"{name}.attn.{norm}.weight", (2 * half,), (scale,))
    yield from _linear(f"{name}.attn.proj", "blocks/attention/proj", d, d, at=(i,))
    yield _same(f"{name}.norm2.weight", "blocks/norm2/scale", d, at=(i,))
    for j, part in enumerate(("w1", "w3")):
        yield _transposed(f"{name}.mlp.{part}.weight", "blocks/mlp/gate_up/kernel", inner, d, at=(i, every, j))
    yield _transposed(f"{name}.mlp.w2.weight", "blocks/mlp/down/kernel", d, inner, at=(i,))
    yield from _linear(f"{name}.adaLN_modulation.0", "blocks/modulation", d, 6 * d, at=(i,))


def _same(name: str, path: str, *shape: int, at: tuple = ()) -> Row:
    return Row(name, shape, (Piece(path, shape, tuple(range(len(shape))), at),))


def _transposed(name: str, path: str, fan_out: int, fan_in: int, *, at: tuple = ()) -> Row:
    return Row(name, (fan_out, fan_in), (Piece(path, (fan_out, fan_in), (1, 0), at),))


def _linear(name: str, path: str, fan_in: int, fan_out: int, *, at: tuple = ()) -> Iterator[Row]:
    yield _transposed(f"{name}.weight", f"{path}/kernel", fan_out, fan_in, at=at)
    yield _same(f"{name}.bias", f"{path}/bias", fan_out, at=at)


def _conv(name: str, path: str, fan_in: int, fan_out: int, window: int, *, transposed: bool = False) -> Iterator[Row]:
    """Their kernel is [out, in, window, window], where transposed [in, out, window, window]; ours [window, window, in, out]."""
    shape = (fan_in, fan_out) if transposed else (fan_out, fan_in)
    shape, axes = (*shape, window, window), (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
    yield Row(f"{name}.weight", shape, (Piece(f"{path}/kernel", shape, axes),))
    yield _same(f"{name}.bias", f"{path}/bias", fan_out)


def _unet(model: config.Model) -> Iterator[Row]:
    widths = [_UNET * 2**i for i in range(_STAGES)]
    name = "local_decoder"
    for i, width in enumerate(widths):
        yield from _conv(f"{name}.enc{i + 1}.0", f"head/down_{i}", widths[i - 1] if i else 3, width, 3)
    yield from _conv(f"{name}.bottleneck.0", "head/bottleneck", widths[-1] + model.width, widths[-1], 1)
    for i, width in reversed(list(enumerate(widths))):
        yield from _conv(f"{name}.up{i + 1}", f"head/upsample_{i}", width, width, 2, transposed=True)
        yield from _conv(f"{name}.dec{i + 1}.0", f"head/up_{i}", 2 * width, widths[max(i - 1, 0)], 3)
    yield from _conv(f"{name}.out_conv", "head/out", _UNET, 3, 1)


def _coordinate_mlp(model: config.Model) -> Iterator[Row]:
    w = model.head_width or 64
    yield from _linear("x_embedder.embedder.0", "head/embed", 3 + _DCT, w)
    for i in range(model.head_depth or 4):
        name = f"blocks.{model.depth + i}"
        yield from _linear(f"{name}.param_generator1.0", f"head/block_{i}/generator", model.width, 4 * w * w)
        yield _same(f"{name}.norm.weight", f"head/block_{i}/norm/scale", w)
    yield _same("final_layer.norm.weight", "head/norm/scale", w)
    yield from _linear("final_layer.linear", "head/out", w, 3)


def _final_layer(model: config.Model) -> Iterator[Row]:
    d, p = model.width, model.patch_size
    pixels = 3 * p * p
    yield Row("final_layer.linear.weight", (pixels, d), (Piece("final/linear/kernel", (3, p, p, d), (3, 1, 2, 0)),))
    yield Row("final_layer.linear.bias", (pixels,), (Piece("final/linear/bias", (3, p, p), (1, 2, 0)),))
    yield from _linear("final_layer.adaLN_modulation.0", "final/modulation", d, 2 * d)


_OFFICIAL = {"head": "unet", "head_pool": "max", "head_upsample": "transposed", "head_feature": "silu", "head_zero_init": False}
NETWORKS = {
    "dip": Network(
        "local_decoder.out_conv.weight",
        "s_embedder.proj.weight",
        _OFFICIAL | {"head_width": _UNET, "head_depth": _STAGES},
        _unet,
    ),
    "pixnerd": Network("x_embedder.embedder.0.weight", "s_embedder.proj.weight", {"head": "coord_mlp"}, _coordinate_mlp),
    "ddt": Network("x_embedder.proj.weight", "x_embedder.proj.weight", {"head": "none"}, _final_layer),
}
