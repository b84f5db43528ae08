"""Where the Patch Detailer Head sits (Figure 5), and the only map over patches.

With tokens s_l after block l, noisy patches p, head h and the DiT's final layer F:
    post_hoc       out = h(p, s_L, t)                                                       (1)
    intermediate   s_k <- s_k + Linear(h(p, s_k, t)) for one k, then out = F(s_L)           (2)
    hybrid         (2) at k, then (1) with a head of its own                                (3)
    residual       out = F(s_L) + h(p, s_L, t)                                              (4)
The first three are the paper's. The last one is for a DiT that is there already: with h = 0 it is that DiT.
A new placement is a function here and a row in `PLACEMENTS`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dip_jax import config
from dip_jax.config.checks import one_of
from dip_jax.errors import UserError
from dip_jax.models import folding
from dip_jax.models.backbone import TOKENS, Along, run_blocks
from dip_jax.models.condition import Conditioning, Modulations
from dip_jax.models.detailers import HEADS, check_head
from dip_jax.models.layers import FinalLayer
from dip_jax.models.linear import Linear
from dip_jax.runtime.sharding import constrain


class MappedHead(nn.Module):
    """The head of `config` over all patches: (p [B, N, P, P, 3], s [B, N, D], t_emb [B, D]) -> [B, N, P, P, 3].

    The parameters are shared, so XLA sees one convolution or product with images and patches folded into its batch.
    """

    config: config.Model

    def setup(self):
        head = HEADS[self.config.head]
        if self.config.head_remat:
            head = nn.remat(head)
        shared = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
        images, patches = folding.AXES
        over_patches = nn.vmap(head, in_axes=(0, 0, None), axis_name=patches, **shared)
        self.mapped = nn.vmap(over_patches, in_axes=(0, 0, 0), axis_name=images, **shared)(self.config)
        nn.share_scope(self, self.mapped)  # no extra level in the parameter tree

    def __call__(self, p: jax.Array, s: jax.Array, t_emb: jax.Array) -> jax.Array:
        parts = folding.count_groups(self.config, images=p.shape[0], patches=p.shape[1])
        groups = zip(jnp.split(p, parts, axis=1), jnp.split(s, parts, axis=1), strict=True)
        return jnp.concatenate([self.mapped(p, s, t_emb) for p, s in groups], axis=1)


def final(model: config.Model, tokens: jax.Array, c: Conditioning, like: jax.Array, *, name: str = "final") -> jax.Array:
    """The final layer F under `name`: tokens [B, N, D] -> patches in the shape of `like`."""
    layer = FinalLayer(3 * model.patch_size**2, jnp.dtype(model.dtype), name=name)
    out = layer(tokens, None, getattr(c, name)) if isinstance(c, Modulations) else layer(tokens, c)
    return out.reshape(like.shape)


def _inject(model: config.Model, p: jax.Array, tokens: jax.Array, t_emb: jax.Array) -> jax.Array:
    """Equation (2), the left half: the refined patches, projected to D, join the tokens."""
    refined = MappedHead(model, name="inject_head")(p, tokens, t_emb)
    project = Linear((model.width,), ("pixels", "embed"), init="xavier", dtype=jnp.dtype(model.dtype), name="inject")
    return constrain(tokens + project(refined.reshape(*tokens.shape[:2], -1)), *TOKENS)


def post_hoc(model: config.Model, p: jax.Array, tokens: jax.Array, t_emb: jax.Array, c: Conditioning, along: Along) -> tuple:
    """Equation (1); head "none" is the DiT-only baseline. Called inside the network's compact method."""
    tokens = run_blocks(model, tokens, c, length=model.depth, name="blocks", along=along)
    if HEADS[model.head] is None:
        return final(model, tokens, c, p), tokens
    return MappedHead(model, name="head")(p, tokens, t_emb), tokens


def _injected(
    model: config.Model, p: jax.Array, tokens: jax.Array, t_emb: jax.Array, c: Conditioning, along: Along
) -> jax.Array:
    tokens = run_blocks(model, tokens, c, length=model.inject_after, name="blocks", along=along)
    tokens = _inject(model, p, tokens, t_emb)
    if model.inject_after < model.depth:
        tokens = run_blocks(
            model,
            tokens,
            c,
            length=model.depth - model.inject_after,
            name="blocks_after",
            first=model.inject_after,
            along=along,
        )
    return tokens


def intermediate(
    model: config.Model, p: jax.Array, tokens: jax.Array, t_emb: jax.Array, c: Conditioning, along: Along
) -> tuple:
    """Equation (2), with k = `inject_after`."""
    tokens = _injected(model, p, tokens, t_emb, c, along)
    return final(model, tokens, c, p), tokens


def hybrid(model: config.Model, p: jax.Array, tokens: jax.Array, t_emb: jax.Array, c: Conditioning, along: Along) -> tuple:
    """Equation (3)."""
    tokens = _injected(model, p, tokens, t_emb, c, along)
    return MappedHead(model, name="head")(p, tokens, t_emb), tokens


def residual(model: config.Model, p: jax.Array, tokens: jax.Array, t_emb: jax.Array, c: Conditioning, along: Along) -> tuple:
    """Equation (4)."""
    tokens = run_blocks(model, tokens, c, length=model.depth, name="blocks", along=along)
    return final(model, tokens, c, p) + MappedHead(model, name="head")(p, tokens, t_emb), tokens


# (model, patches, embedded tokens, t_emb, c, along) -> (output patches [B, N, P, P, 3], tokens after the last block [B, N, D]).
PLACEMENTS: dict[str, Callable] = {"post_hoc": post_hoc, "intermediate": intermediate, "hybrid": hybrid, "residual": residual}


def check_placement(model: config.Model) -> None:
    """Refuses a head or placement that cannot be built.

    Raises:
        UserError: for a name that is in no table, what `check_head` refuses, or a placement of no head.
    """
    check_head(model)
    one_of("model.placement", model.placement, PLACEMENTS)
    if HEADS[model.head] is None and model.placement != "post_hoc":
        raise UserError(f"model.placement={model.placement!r} has no head to place: model.head=none goes with post_hoc")
