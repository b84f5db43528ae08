"""What the network makes of time and label alone: embeddings, the condition, and the adaLN of every block.

    t_emb = TimeEmbed(t);  c = SiLU(t_emb + LabelEmbed(y))        (1)
    adaLN_l = Linear_l(c),  l = 1..L                              (2)

Training computes (2) inside the blocks. Sampling knows all its times and labels beforehand: `modulations` computes (2) for all
of them, so that a third of the blocks' weights is read once instead of once per step.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from dip_jax import config
from dip_jax.models.linear import Linear, modulation, named, normal
from dip_jax.runtime.sharding import constrain
from dip_jax.typing import Labels, Params


@struct.dataclass
class Modulations:
    """The network's whole reading of (t, y). Leading axes [B] for one call of the network, [S, B] for S times at once."""

    time: Any  # t_emb [..., B, D], float32
    blocks: dict[str, Any]  # equation (2) by stack, [..., B, L, 1, 6, D]; this and `final` in the compute dtype
    final: Any  # adaLN of the final layer [..., B, 1, 2, D]; None where there is none
    internal: Any = None  # the same of the second output
    label: Any = None  # the label's embedding [..., B, D], float32, where in-context tokens read it


Conditioning = jax.Array | Modulations  # c [B, 1, D], or all that the network makes of it


class Condition(nn.Module):
    """Equation (1): t [B], y [B] -> (t_emb [B, D] float32, c [B, 1, D] in the compute dtype, LabelEmbed(y) [B, D] float32)."""

    config: config.Model

    @nn.compact
    def __call__(self, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        t_emb = TimeEmbed(self.config.width, name="time")(t)
        y_emb = LabelEmbed(self.config.num_classes, self.config.width, self.config.label_std, name="label")(y)
        return t_emb, nn.silu(t_emb + y_emb)[:, None, :].astype(jnp.dtype(self.config.dtype)), y_emb


def modulations(model: config.Model, params: Params, times: Float[jax.Array, "S"], labels: Labels) -> Modulations:
    """Equation (2) for every time with every label: leading axes [S, B] for times [S] and labels [B]."""

    def condition(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return Condition(model).apply({"params": params["condition"]}, jnp.broadcast_to(t, labels.shape), labels)

    time, c, label = jax.vmap(condition)(times)

    def adaln(parts: int, weights: Params) -> jax.Array:
        return modulation(parts, model.width, dtype=jnp.dtype(model.dtype)).apply({"params": weights}, c)

    def of_stack(weights: Params) -> jax.Array:
        made = jax.vmap(lambda layer: adaln(6, layer), out_axes=2)(weights)
        return constrain(made, None, "batch", "layers", None, None, "act_embed")  # for the reason given in `Block`

    blocks = {name: of_stack(part["modulation"]) for name, part in params.items() if name.startswith("blocks")}
    outputs = {name: adaln(2, params[name]["modulation"]) if name in params else None for name in ("final", "internal")}
    return Modulations(time, blocks, **outputs, label=label if model.context_tokens else None)


def time_features(t: jax.Array) -> jax.Array:
    """t [B] in [0, 1], unscaled -> 128 cosines then 128 sines [B, 256] with periods 2 pi to 20 pi (max_period = 10)."""
    frequencies = np.exp(-math.log(10) * np.arange(128) / 128).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ContextTokens(nn.Module):
    """LabelEmbed(y) [B, D] -> in-context tokens [B, n, D]: the embedding n times, plus a learned table (JiT, Li & He 2025)."""

    config: config.Model

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        shape = (self.config.context_tokens, self.config.width)
        table = self.param("table", named(normal(0.02), (None, "embed")), shape)
        return (label[:, None, :] + table[None].astype(jnp.float32)).astype(jnp.dtype(self.config.dtype))


class TimeEmbed(nn.Module):
    """t [B] -> t_emb [B, D]: Linear, SiLU, Linear on `time_features`, all in float32."""

    width: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        hidden = nn.silu(Linear((self.width,), ("frequency", "embed"), init="normal", name="in")(time_features(t)))
        return Linear((self.width,), ("embed", None), init="normal", name="out")(hidden)


class LabelEmbed(nn.Module):
    """y [B] in 0..num_classes -> y_emb [B, D], float32; row num_classes is the null class; other labels give NaN."""

    num_classes: int
    width: int
    std: float = 0.02

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        table = self.param("table", named(normal(self.std), ("vocab", "embed")), (self.num_classes + 1, self.width))
        return jnp.take(table.astype(jnp.float32), y, axis=0)
