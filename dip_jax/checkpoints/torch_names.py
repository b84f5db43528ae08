"""Named tensors of a published PyTorch network -> our model and parameters, and back (`torch_tables` has the names)."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dip_jax import config
from dip_jax.checkpoints.torch_tables import NETWORKS, Network, rows
from dip_jax.errors import UserError
from dip_jax.models import detailers, dip
from dip_jax.typing import Params

_LISTED = 8  # names in an error message


def recognise(tensors: dict[str, np.ndarray]) -> str:
    """The row of NETWORKS that tensors without prefix belong to.

    Raises:
        UserError: if none has its mark.
    """
    for name, network in NETWORKS.items():
        if network.mark in tensors:
            return name
    marks = ", ".join(f"{network.mark} ({name})" for name, network in NETWORKS.items())
    raise UserError(f"not recognised: it has none of {marks}; its first names are {', '.join(list(tensors)[:3])}")


def network_of(model: config.Model) -> str:
    """The row of NETWORKS that computes what a model of ours computes.

    Raises:
        UserError: if none does, naming the options that it would need; those of the network with this head where there is one.
    """
    lacking = {name: _lacking(model, network) for name, network in NETWORKS.items()}
    for name, options in lacking.items():
        if not options:
            return name
    nearest = next((name for name, network in NETWORKS.items() if network.fields["head"] == model.head), None)
    if nearest is None:
        heads = ", ".join(f"{network.fields['head']} ({name})" for name, network in NETWORKS.items())
        raise UserError(f"no published network has the head {model.head!r}, only {heads}")
    raise UserError(f"{nearest} is another network: {'; '.join(lacking[nearest])}")


def _lacking(model: config.Model, network: Network) -> list[str]:
    wanted = {
        "placement": "post_hoc",
        "position": "rope",
        "prediction": "v",
        "internal": False,
        "context_tokens": 0,
    } | network.fields
    wanted.pop("head_zero_init", None)  # how training started, not what is computed
    found = {key: getattr(model, key) for key in wanted}
    if model.head == "unet":
        found |= {"head_width": model.head_width or 64, "head_depth": detailers.unet_depth(model)}
    return [f"model.{key} is {found[key]!r} here, {value!r} there" for key, value in wanted.items() if found[key] != value]


def shapes(model: config.Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the PyTorch network that a model of ours equals; raises as `network_of`."""
    return {row.name: row.shape for row in rows(NETWORKS[network_of(model)], model)}


def to_params(
    tensors: dict[str, np.ndarray], *, source: str, image_size: tuple[int, ...] | None = None, dtype: str = "bfloat16"
) -> tuple[config.Model, Params]:
    """Named tensors of a PyTorch network -> the model section and its parameters, float32.

    Args:
        tensors: under the network's own names, without prefix.
        source: row of NETWORKS.
        image_size: side of the images, or (H, W); None is 16 patches (256 at P=16, 512 at P=32).
        dtype: what the model computes in.

    Raises:
        UserError: listing every missing, extra or mis-shaped tensor; for an image size that the patch size does not divide.
    """
    model = _read_sizes(tensors, source, image_size, dtype)
    table = list(rows(NETWORKS[source], model))
    _require_fit(tensors, {row.name: row.shape for row in table})
    wanted = jax.eval_shape(dip.from_config(model).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), wanted)
    ours = _by_path(params)
    for row in table:
        for piece in row.pieces:
            piece.read(tensors[row.name], ours)
    return model, params


def to_tensors(params: Params, model: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Inverse of `to_params`: name and float32 values of every tensor, in the PyTorch network's order.

    Raises:
        UserError: as `network_of`.
    """
    ours = {path: np.asarray(leaf) for path, leaf in _by_path(params).items()}
    for row in rows(NETWORKS[network_of(model)], model):
        tensor = np.empty(row.shape, np.float32)
        for piece in row.pieces:
            piece.write(ours, tensor)
        yield row.name, tensor


def _by_path(params: Params) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _require_fit(tensors: dict[str, np.ndarray], wanted: dict[str, tuple[int, ...]]) -> None:
    wrong = [f"{name}: missing" for name in wanted if name not in tensors]
    wrong += [
        f"{name}: {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    wrong += [f"{name}: extra" for name in sorted(tensors.keys() - wanted.keys())]
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise UserError(f"{len(wrong)} tensors do not fit the network: {'; '.join(wrong[:_LISTED])}{more}")


def _read_sizes(tensors: dict[str, np.ndarray], source: str, image_size: tuple[int, ...] | None, dtype: str) -> config.Model:
    """The model whose sizes the shapes of the tensors tell."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != rank or not tensors[name].size:
            found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise UserError(f"tensor {name}, which tells the sizes, {found}: is --from right, and the file complete?")
        return tensors[name].shape

    network = NETWORKS[source]
    width, columns = shape(network.embed, 2)
    patch_size = math.isqrt(columns // 3)
    if 3 * patch_size**2 != columns:
        raise UserError(
            f"{network.embed} has {columns} columns, not 3 P^2: these are not weights for pixels (latent models do not fit)"
        )
    found = [re.match(r"blocks\.(\d+)\.(param_generator1\.)?", name) for name in tensors]
    blocks = {match[1] for match in found if match}
    decoder = {match[1] for match in found if match and match[2]}
    (head_dim,) = shape("blocks.0.attn.q_norm.weight", 1)
    labels = shape("y_embedder.embedding_table.weight", 2)[0]
    if width % head_dim:
        raise UserError(f"blocks.0.attn.q_norm.weight has {head_dim} entries, which do not divide the width {width}")
    fields = dict(network.fields)
    if source == "pixnerd":
        fields |= {"head_width": shape(network.mark, 2)[0], "head_depth": len(decoder)}
    return config.Model(
        depth=len(blocks - decoder),
        width=width,
        num_heads=width // head_dim,
        patch_size=patch_size,
        num_classes=labels - 1,
        image_size=image_size or (16 * patch_size,),
        dtype=dtype,
        **fields,
    )
