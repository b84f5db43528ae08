"""The DiT backbone (section 3.2): embeddings, condition, and the scanned, rematerialised stack of blocks.

With tokens s, times t and labels y:
    t_emb = TimeEmbed(t);  c = SiLU(t_emb + LabelEmbed(y))        (1)
    s_0 = Linear(flatten(p))                                      (2)
    s_l = Block_l(s_{l-1}, c),  l = 1..L                          (3)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dip_jax import config
from dip_jax.models.layers import Block, LabelEmbed, Linear, TimeEmbed
from dip_jax.sharding import constrain

TOKENS = ("batch", "tokens", "act_embed")

# What the forward pass keeps for the backward pass; "none" keeps everything.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Condition(nn.Module):
    """Equation (1): t [B], y [B] -> (t_emb [B, D] float32, c [B, 1, D] in the compute dtype)."""

    config: config.Model

    @nn.compact
    def __call__(self, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        t_emb = TimeEmbed(self.config.width, name="time")(t)
        y_emb = LabelEmbed(self.config.num_classes, self.config.width, name="label")(y)
        return t_emb, nn.silu(t_emb + y_emb)[:, None, :].astype(jnp.dtype(self.config.dtype))


class PatchEmbed(nn.Module):
    """Equation (2): patches [B, N, P, P, C] -> tokens [B, N, D]."""

    config: config.Model

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        rows = patches.reshape(*patches.shape[:2], -1)
        tokens = Linear(
            (self.config.width,), ("pixels", "embed"), init="xavier", dtype=jnp.dtype(self.config.dtype), name="linear"
        )(rows)
        return constrain(tokens, *TOKENS)


class _Step(nn.Module):
    """`Block` as a scan body; tokens are pinned to the mesh between blocks."""

    config: config.Model

    def setup(self):
        model = self.config
        grid = (model.image_size[0] // model.patch_size, model.image_size[1] // model.patch_size)
        self.block = Block(model.num_heads, grid, model.attention, lead=TOKENS[:2], dtype=jnp.dtype(model.dtype))
        nn.share_scope(self, self.block)  # no extra level in the parameter tree

    def __call__(self, tokens: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
        return constrain(self.block(tokens, c), *TOKENS), None


def stack(model: config.Model, *, length: int, name: str) -> Any:
    """Equation (3) for `length` blocks: a module (tokens [B, N, D], c [B, 1, D]) -> (tokens, None).

    Its parameters carry a leading "layers" axis whether `scan_layers` compiles one block or unrolls them all.
    """
    step = _Step
    if model.remat != "none":
        # Inside a while loop nothing can be merged across the boundary; unrolled, XLA would undo the rematerialisation.
        step = nn.remat(step, policy=REMAT_POLICIES[model.remat], prevent_cse=not model.scan_layers)
    scanned = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
        unroll=1 if model.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(model, name=name)
