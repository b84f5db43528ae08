"""A model's first weights from those of another one: a DiT-only one, or one of other classes, resolution or patch size.

Blocks, embedding of time, and heads of the same shapes are taken as they are. Positions need nothing: RoPE has no parameters,
the fixed table is computed. What depends on classes or patch is mapped, so that the first prediction is the other model's:

    label table   a row of the other's table per class, the null row last                            (1)
    into tokens   K'[(a,b,c), d] = sum_ij A[i,a] A[j,b] K[(i,j,c), d]                                 (2)
    out of them   K'[d, (a,b,c)] = sum_ij U[a,i] U[b,j] K[d, (i,j,c)], the bias alike                (3)

K is the kernel of a product with the pixels (i,j,c) of a patch. A [P, P'] makes a patch of P pixels out of one of P', U [P', P]
one of P' out of P: by (2) a patch is embedded as the other model would embed it shrunk, by (3) the prediction is enlarged.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.typing import Params

# In their order; the second half only where a head sits between them, the others only where in-context tokens join.
_STACKS = ("blocks", "blocks_context", "blocks_after", "blocks_after_context")
_BACKBONE = ("condition", "patch_embed", *_STACKS, "final")
_HEADS = {"head": ("head",), "inject_head": ("inject_head", "inject")}  # each with what reads it
# What a head computes beyond its parameters' shapes.
_HEAD_FIELDS = ("head", "head_pool", "head_upsample", "head_feature")
_MEANING_FIELDS = ("prediction", "position")  # the same weights say something else


@dataclasses.dataclass(frozen=True)
class Origin:
    """The other model."""

    model: config.Model
    params: Params
    classes: tuple[str, ...] = ()  # names by label, where they are known


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of a label table come from."""

    of: tuple[int, ...]  # by class: the other table's row; its null row for a new class
    how: str  # in words, for the user; empty where nothing changed


def match_classes(old: Sequence[str], new: Sequence[str], *, before: int, now: int) -> Rows:
    """Which row of a table of `before` classes each of `now` classes starts from: by name where any is shared, else by number.

    A class that the other model did not have starts as its null class: it is drawn as if no class had been named.

    Args:
        old, new: names by label; empty where they are not known.
        before, now: numbers of classes.
    """
    old, new = (list(names) if len(names) == count else [] for names, count in ((old, before), (new, now)))
    if before == now and (not old or not new or old == new):
        return Rows(tuple(range(now)), "")
    shared = set(old) & set(new)
    if shared:
        place = {name: row for row, name in reversed([*enumerate(old)])}
        rows = tuple(place.get(name, before) for name in new)
    else:
        rows = tuple(min(label, before) for label in range(now))
    kept = sum(row < before for row in rows)
    by = "name" if shared else "number"
    return Rows(rows, f"{kept} of {now} classes by {by}, {now - kept} new (as the null class), {before - kept} left out")


def start_from(params: Params, origin: Origin, *, model: config.Model, rows: Rows) -> Params:
    """The weights `params` of a new `model` with all that `origin` can give, as host arrays: `params` may lie on any devices.

    Args:
        params: from `init`.
        origin: of the same depth and width; any head, placement, image size, patch size and classes.
        model: of `params`.
        rows: from `match_classes`.

    Raises:
        UserError: if a shape differs for another reason than classes and patch size.
    """
    source = _restacked(jax.tree.map(np.asarray, origin.params), params)
    source = _with_rows(source, rows)
    if origin.model.patch_size != model.patch_size:
        source = _with_patches(source, origin.model.patch_size, model.patch_size)
    shared = [name for name in _BACKBONE if name in params and name in source]
    wrong = []
    for name in shared:
        new, old = (_shapes(tree[name]) for tree in (params, source))
        wrong += [f"{name}{path}: {old.get(path)} instead of {shape}" for path, shape in new.items() if old.get(path) != shape]
    if wrong:
        raise UserError(f"the weights to start from do not fit this model: {'; '.join(wrong[:5])}")
    if _same_context(params, origin):
        shared.append("context")
    if _same_internal(params, origin, model=model):
        shared.append("internal")
    shared += [part for name in shared_heads(params, origin, model=model) for part in _HEADS[name]]
    return {**params, **{name: source[name] for name in shared}}


def begin(params: Params, origin: Origin, *, model: config.Model, classes: Sequence[str]) -> tuple[Params, str]:
    """`start_from` with the classes of a dataset, whose names may not be known; also what carried over, in words."""
    rows = match_classes(origin.classes, classes, before=origin.model.num_classes, now=model.num_classes)
    return start_from(params, origin, model=model, rows=rows), describe(params, origin, model=model, rows=rows)


def shared_heads(params: Params, origin: Origin, *, model: config.Model) -> list[str]:
    """The heads that carry over: the same kind in the same place, with the same shapes."""
    same = all(getattr(model, name) == getattr(origin.model, name) for name in _HEAD_FIELDS)
    there = [name for name in _HEADS if name in params and name in origin.params]
    return [name for name in there if same and _shapes(params[name]) == _shapes(origin.params[name])]


def _same_context(params: Params, origin: Origin) -> bool:
    return "context" in params and _shapes(params["context"]) == _shapes(origin.params.get("context", {}))


def _same_internal(params: Params, origin: Origin, *, model: config.Model) -> bool:
    """Whether the second output carries over: it reads the same block, and has the same shape."""
    there = model.internal and origin.model.internal and model.internal_block == origin.model.internal_block
    return there and _shapes(params["internal"]) == _shapes(origin.params["internal"])


def describe(params: Params, origin: Origin, *, model: config.Model, rows: Rows) -> str:
    """What carries over, in a few words for the user."""
    heads = [name for name in _HEADS if name in params]
    kept = shared_heads(params, origin, model=model)
    said = ["the backbone and the head" if heads and kept == heads else "the backbone"]
    said += [rows.how] if rows.how else []
    if origin.model.patch_size != model.patch_size:
        said.append(f"patches of {origin.model.patch_size} resized to {model.patch_size}")
    if origin.model.image_size != model.image_size:
        said.append("images of {} x {}, were {} x {}".format(*model.image_size, *origin.model.image_size))
    said += ["a new head"] if heads and kept != heads else []
    said += ["new in-context tokens"] if "context" in params and not _same_context(params, origin) else []
    said += ["a new second output"] if model.internal and not _same_internal(params, origin, model=model) else []
    differing = [name for name in _MEANING_FIELDS if getattr(model, name) != getattr(origin.model, name)]
    said += [f"{name} {getattr(model, name)}, was {getattr(origin.model, name)}" for name in differing]
    return "; ".join(said)


def _restacked(source: Params, like: Params) -> Params:
    """The blocks in the stacks of `like`: several where a head sits between them or in-context tokens join."""
    stacks = [source[name] for name in _STACKS if name in source]
    blocks = jax.tree.map(lambda *parts: np.concatenate(parts), *stacks)
    source, first = {name: part for name, part in source.items() if name not in _STACKS}, 0
    names = [name for name in _STACKS if name in like]
    for name in names:
        # The last stack takes what is left, so that another depth is told by its shapes.
        last = None if name == names[-1] else first + jax.tree.leaves(like[name])[0].shape[0]
        source[name] = jax.tree.map(lambda a, part=slice(first, last): a[part], blocks)
        first = last
    return source


def _with_rows(source: Params, rows: Rows) -> Params:
    """Equation (1)."""
    table = source["condition"]["label"]["table"]
    null = table.shape[0] - 1
    table = table[np.asarray([*rows.of, null])]
    return {**source, "condition": {**source["condition"], "label": {"table": table}}}


def _with_patches(source: Params, before: int, now: int) -> Params:
    """Equations (2) and (3)."""
    inwards, outwards = shrinking(now, before), enlarging(before, now)

    def embedded(kernel: np.ndarray) -> np.ndarray:
        grid = kernel.reshape(before, before, 3, -1)
        return np.einsum("ia,jb,ijcd->abcd", inwards, inwards, grid).reshape(3 * now**2, -1)

    def predicted(array: np.ndarray) -> np.ndarray:
        grid = array.reshape(-1, before, before, 3)
        return np.einsum("ai,bj,dijc->dabc", outwards, outwards, grid).reshape(*array.shape[:-1], 3 * now**2)

    linear = source["patch_embed"]["linear"]
    source = {**source, "patch_embed": {"linear": {**linear, "kernel": embedded(linear["kernel"])}}}
    if "inject" in source:
        source["inject"] = {**source["inject"], "kernel": embedded(source["inject"]["kernel"])}
    if "final" in source:
        final = source["final"]
        source["final"] = {**final, "linear": jax.tree.map(predicted, final["linear"])}
    return source


def shrinking(old: int, new: int) -> np.ndarray:
    """[new, old]: each of `new` pixels is the mean of what it covers of `old` ones."""
    edges = np.arange(new + 1) * old / new
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(old)[None]
    covered = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    return (covered / covered.sum(1, keepdims=True)).astype(np.float32)


def enlarging(old: int, new: int) -> np.ndarray:
    """[new, old]: `new` pixels between `old` ones, linearly, the outermost repeated."""
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old)[None])).astype(np.float32)


def _shapes(tree: Params) -> dict[str, list[int]]:
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
