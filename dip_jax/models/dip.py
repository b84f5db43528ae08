"""The model on one page: (x_t, t, y) -> prediction, with no randomness and no training flag.

    p = patchify(x_t);  t_emb, c = Condition(t, y);  s = PatchEmbed(p)      (t_emb, c, or all that is made of them, ahead)
    blocks, head and final layer by placement (`models/placement.py`)
    prediction = unpatchify(out)

Everything outside `models/` sees parameters as a plain nested dict of float32 arrays; Linen stays behind this seam.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.models import asym, condition
from dip_jax.models.backbone import TOKENS, Along, PatchEmbed, Tap
from dip_jax.models.condition import Condition, ContextTokens, Modulations
from dip_jax.models.linear import Named, named, zeros
from dip_jax.models.patches import patchify, unpatchify
from dip_jax.models.placement import PLACEMENTS, check_placement, final
from dip_jax.runtime.sharding import constrain, is_axes
from dip_jax.typing import Images, Labels, Params, PRNGKey, Times, Tokens


class _Network(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(
        self, x_t: jax.Array, t: jax.Array, y: jax.Array, ahead: Modulations | None, after: int | None, internal: bool
    ) -> tuple:
        model = self.config
        p = patchify(x_t, model.patch_size)
        p = constrain(p, "batch", "tokens", "height", "width", "channels")
        read = (ahead.time, ahead, ahead.label) if ahead is not None else Condition(model, name="condition")(t, y)
        t_emb, c, label = read
        context = ContextTokens(model, name="context")(label) if model.context_tokens else None
        tokens = PatchEmbed(model, name="patch_embed")(p)
        asked, early = Tap(after or 0), Tap(model.internal_block)
        taps = (asked,) * (after is not None) + (early,) * internal
        out, tokens = PLACEMENTS[model.placement](model, p, tokens, t_emb, c, Along(taps, context))
        features = constrain(tokens, *TOKENS) if after is None else asked.tokens
        outputs = [out, final(model, early.tokens, c, p, name="internal")] if internal else [out]
        images = [unpatchify(each, model.image_size) for each in self._as_predicted(outputs, p, t)]
        return images[0], features, images[1] if internal else None

    def _as_predicted(self, outputs: list[jax.Array], p: jax.Array, t: jax.Array) -> list[jax.Array]:
        """Patches of the outputs as others read them, float32."""
        model, outputs = self.config, [each.astype(jnp.float32) for each in outputs]
        if model.prediction != "asym" or not model.subspace_rank:
            return outputs
        shape = (3 * model.patch_size**2, model.subspace_rank)
        basis = self.param(asym.SUBSPACE, named(zeros, ("pixels", None)), shape)
        return [asym.to_image(each, p, t, basis, t_clip=model.t_clip) for each in outputs]


class Outputs(NamedTuple):
    """What one pass through the network gives."""

    prediction: Images  # float32 [B, H, W, 3]
    tokens: Tokens
    internal: Images | None  # the second output, a prediction of the same kind; None without `model.internal`


@dataclasses.dataclass(frozen=True)
class DiP:
    """A model: its config and three pure functions. Hashable, so that it can be a static argument of `jax.jit`."""

    config: config.Model

    def init(self, key: PRNGKey) -> Params:
        """Fresh parameters: a nested dict of float32 arrays. Jit it; under `jax.eval_shape` it is cheap at every size."""
        return nn.meta.unbox(self._init_named(key))

    def apply(self, params: Params, x_t: Images, t: Times, y: Labels, ahead: Modulations | None = None) -> Images:
        """The prediction, float32 [B, H, W, 3].

        Args:
            params: from `init`, or as `cast` makes them.
            x_t: noisy images in [-1, 1] where they are data, [B, H, W, 3].
            t: times [B] in [0, 1]; 0 is noise.
            y: labels [B]; `config.num_classes` is the null class, anything beyond gives NaN.
            ahead: what `modulations` gave for these t and y, in the place of which it is read.
        """
        return self._run(params, x_t, t, y, ahead=ahead)[0]

    def modulations(self, params: Params, ts: Float[jax.Array, "S"], y: Labels) -> Modulations:
        """All that the network reads of every time [S] with every label [B], in one product: leading axes [S, B].

        Slice s is for `apply(..., ahead=)`. It takes 6 D L numbers of the compute dtype per time and label.
        """
        return condition.modulations(self.config, params, ts, y)

    def cast(self, params: Params) -> Params:
        """Parameters as the products read them: in the compute dtype, so that sampling converts and reads them once.

        What is added up in float32 before it is converted stays float32: embeddings of time and label, norms, and the 3x3
        kernels whose taps `models/folding.py` merges. `apply` gives the same bits.
        """
        exact = {"norm", "kernel"}

        def each(path, axes, array):
            stays = path[0].key in ("condition", "context", asym.SUBSPACE) or exact & {*axes}
            return array if stays else array.astype(jnp.dtype(self.config.dtype))

        return jax.tree_util.tree_map_with_path(each, self.logical_axes(), params, is_leaf=is_axes)

    def convert_once(self, params: Params) -> Params:
        """The blocks' kernels in the compute dtype, for a training step: once, not by each pass over each block.

        Each is read by one product, so that its gradient has the same bits as without; stacked gradients are half as large. All
        else is left as it is: the gradients of biases and heads are sums, which stay in float32.
        """

        def each(path, array):
            of_block = path[0].key.startswith("blocks") and path[-1].key == "kernel"
            return array.astype(jnp.dtype(self.config.dtype)) if of_block else array

        return jax.tree_util.tree_map_with_path(each, params)

    def features(self, params: Params, x_t: Images, t: Times, y: Labels) -> Tokens:
        """The tokens after the last block, [B, N, D]: what Figure 8 visualises."""
        return self._run(params, x_t, t, y)[1]

    def apply_with_features(self, params: Params, x_t: Images, t: Times, y: Labels, *, after: int) -> tuple[Images, Tokens]:
        """The prediction as by `apply`, and the tokens [B, N, D] after block `after`, from 1 to the depth."""
        return self._run(params, x_t, t, y, after=after)[:2]

    def apply_all(
        self, params: Params, x_t: Images, t: Times, y: Labels, ahead: Modulations | None = None, *, after: int | None = None
    ) -> Outputs:
        """All outputs of one pass; `ahead` as in `apply`, `after` as in `apply_with_features` (None: after the last block)."""
        return Outputs(*self._run(params, x_t, t, y, ahead=ahead, after=after, internal=self.config.internal))

    def logical_axes(self) -> Any:
        """The tree of `init` with each array replaced by its tuple of logical axis names (see `sharding.RULES`)."""
        return _logical_axes(self)

    def _run(
        self,
        params: Params,
        x_t: Images,
        t: Times,
        y: Labels,
        *,
        ahead: Modulations | None = None,
        after: int | None = None,
        internal: bool = False,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if x_t.shape[1:] != (*self.config.image_size, 3):
            raise UserError(
                f"images of shape {x_t.shape[1:]} do not fit model.image_size={self.config.image_size} with 3 channels"
            )
        return _Network(self.config).apply({"params": params}, x_t, t, y, ahead, after, internal)

    def _init_named(self, key: PRNGKey) -> Any:
        x_t = jnp.zeros((1, *self.config.image_size, 3), jnp.float32)
        t, y = jnp.zeros((1,), jnp.float32), jnp.zeros((1,), jnp.int32)
        return _Network(self.config).init(key, x_t, t, y, None, None, self.config.internal)["params"]


@functools.cache
def _logical_axes(model: DiP) -> Any:
    boxes = jax.eval_shape(model._init_named, jax.random.key(0))
    return jax.tree.map(lambda box: box.axes, boxes, is_leaf=lambda node: isinstance(node, Named))


def from_config(model: config.Model) -> DiP:
    """The model of a checked config section.

    Raises:
        UserError: for a head or a placement that cannot be built, and where the number of classes is left to a dataset.
    """
    if not model.num_classes:
        raise UserError("model.num_classes=0 is as many as the dataset has, and there is none here: give the number itself")
    check_placement(model)
    return DiP(model)


def build(
    name: str = "DiP-XL/16",
    *,
    head: str = "unet",
    placement: str = "post_hoc",
    image_size: int | tuple[int, int] = 256,
    num_classes: int = 1000,
    **model_fields: Any,
) -> DiP:
    """The model "DiP-SIZE/PATCH" or "DiT-SIZE/PATCH" (no head), with any field of `config.Model` by keyword.

    Example:
        >>> model = build("DiP-S/16", image_size=128, num_classes=10)
        >>> params = jax.jit(model.init)(jax.random.key(0))

    Raises:
        UserError: for a malformed name or a combination that cannot be built.
    """
    match = re.fullmatch(r"(DiP|DiT)-([A-Za-z]+)/(\d+)", name)
    if not match:
        raise UserError(f"model name {name!r} is not DiP-SIZE/PATCH, such as DiP-XL/16; sizes: {', '.join(config.SIZES)}")
    family, size, patch_size = match.groups()
    fields = {
        "size": size,
        "patch_size": int(patch_size),
        "head": "none" if family == "DiT" else head,
        "placement": placement,
        "image_size": (image_size, image_size) if isinstance(image_size, int) else tuple(image_size),
        "num_classes": num_classes,
    }
    unknown = sorted(set(model_fields) - {field.name for field in dataclasses.fields(config.Model)})
    if unknown:
        raise UserError(f"build() got unknown model fields {', '.join(unknown)}; see dip_jax.config.Model")
    return from_config(config.Model(**fields, **model_fields))
