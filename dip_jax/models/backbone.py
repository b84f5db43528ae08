"""The DiT backbone (section 3.2): patch embedding and the scanned, rematerialised stack of blocks.

With tokens s and the condition c of `models/condition.py`:
    s_0 = Linear(flatten(p))                                      (1)
    s_l = Block_l(s_{l-1}, c),  l = 1..L                          (2)
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dip_jax import config
from dip_jax.models.condition import Conditioning, Modulations
from dip_jax.models.layers import Block, sincos_table
from dip_jax.models.linear import PRODUCT, Linear
from dip_jax.runtime.sharding import constrain

TOKENS = ("batch", "tokens", "act_embed")

# What the forward pass keeps for the backward pass; "none" keeps everything.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class PatchEmbed(nn.Module):
    """Equation (1): patches [B, N, P, P, C] -> tokens [B, N, D]."""

    config: config.Model

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        model, dtype = self.config, jnp.dtype(self.config.dtype)
        rows = patches.reshape(*patches.shape[:2], -1)
        tokens = Linear((model.width,), ("pixels", "embed"), init="xavier", dtype=dtype, name="linear")(rows)
        if model.position == "rope+sincos":
            tokens = tokens + jnp.asarray(sincos_table(_grid(model), model.width), dtype)[None]
        return constrain(tokens, *TOKENS)


def _grid(model: config.Model) -> tuple[int, int]:
    return model.image_size[0] // model.patch_size, model.image_size[1] // model.patch_size


@dataclasses.dataclass
class Tap:
    """Tokens taken on their way: `run_blocks` fills in those after block `after` (from 1) while the network is traced."""

    after: int
    tokens: jax.Array | None = None


@dataclasses.dataclass
class Along:
    """What goes along with the tokens through all stacks of blocks while the network is traced."""

    taps: tuple[Tap, ...] = ()
    context: jax.Array | None = None  # in-context tokens [B, n, D]; they join the image's in stacks named NAME_context


class _Step(nn.Module):
    """`Block` as a scan body; tokens are pinned to the mesh between blocks, and kept where `take` says so."""

    config: config.Model
    context: int = 0

    def setup(self):
        model, block = self.config, Block
        if model.remat != "none":
            # Inside a while loop nothing can be merged across the boundary; unrolled, XLA would undo the rematerialisation.
            block = nn.remat(block, policy=REMAT_POLICIES[model.remat], prevent_cse=not model.scan_layers)
        self.block = block(
            model.num_heads, _grid(model), model.attention, lead=TOKENS[:2], dtype=jnp.dtype(model.dtype), context=self.context
        )
        nn.share_scope(self, self.block)  # no extra level in the parameter tree

    def __call__(self, carry: tuple, c: jax.Array | None, adaln: jax.Array | None, takes: tuple[jax.Array, ...]) -> tuple:
        tokens, taken = carry
        tokens = constrain(self.block(tokens, c, adaln), *TOKENS)
        return (tokens, tuple(jnp.where(take, tokens, old) for take, old in zip(takes, taken, strict=True))), None


def run_blocks(
    model: config.Model,
    tokens: jax.Array,
    c: Conditioning,
    *,
    length: int,
    name: str,
    first: int = 0,
    along: Along | None = None,
) -> jax.Array:
    """Equation (2) for `length` blocks: tokens [B, N, D] -> [B, N, D]; called inside the network's compact method.

    The parameters carry a leading "layers" axis whether `scan_layers` compiles one block or unrolls them all. `first` blocks
    lie before these; the taps of `along` take tokens from among them without a change to the parameters.
    """
    before = min(max(model.context_start - first, 0), length)
    if before:
        tokens = _scan(model, tokens, c, length=before, name=name, first=first, along=along)
    if before == length:
        return tokens
    n = model.context_tokens
    joined = jnp.concatenate([along.context, tokens], axis=1)
    joined = _scan(
        model, joined, c, length=length - before, name=f"{name}_context", first=first + before, along=along, context=n
    )
    along.context = joined[:, :n]
    return constrain(joined[:, n:], *TOKENS)


def _scan(
    model: config.Model,
    tokens: jax.Array,
    c: Conditioning,
    *,
    length: int,
    name: str,
    first: int,
    along: Along | None,
    context: int = 0,
) -> jax.Array:
    """One stack of `run_blocks`; `context` of the tokens are no image's."""
    taps = [tap for tap in along.taps if first < tap.after <= first + length] if along else []
    scanned = nn.scan(
        _Step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 1, 0),
        length=length,
        unroll=1 if model.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    ahead = isinstance(c, Modulations)
    told = (None, c.blocks[name]) if ahead else (c, None)
    takes = tuple(jnp.arange(1, length + 1) == tap.after - first for tap in taps)
    (tokens, taken), _ = scanned(model, context, name=name)((tokens, (tokens,) * len(taps)), *told, takes)
    for tap, kept in zip(taps, taken, strict=True):
        tap.tokens = kept[:, context:]
    return tokens
