"""The shape legend, used in every signature and docstring of the package.

    B  images in a batch          N  patches (tokens) per image
    H, W  image height, width     D  width of the backbone
    C  colour channels (3)        K  attention heads
    P  side of a patch, pixels    L  layers (DiT blocks)

`t` runs from 0 (noise) to 1 (data) everywhere; images inside the model are float in [-1, 1].
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Float, Int, Key, UInt8

Params: TypeAlias = Mapping[str, Any]  # a plain nested dict of arrays
Axes: TypeAlias = tuple[str | None, ...]  # logical axis names of one array, e.g. ("embed", "mlp")

Images: TypeAlias = Float[jax.Array, "B H W C"]
Times: TypeAlias = Float[jax.Array, "B"]
Labels: TypeAlias = Int[jax.Array, "B"]
RawImages: TypeAlias = UInt8[jax.Array, "B H W C"]
Tokens: TypeAlias = Float[jax.Array, "B N D"]
PRNGKey: TypeAlias = Key[jax.Array, ""]

Predict: TypeAlias = Callable[..., Images]  # (x_t, t, y) -> prediction; where told so, also of what was made of (t, y) ahead
# Made for all steps at once: (times [S], labels [B]) -> a tree whose arrays begin with [S, B].
Ahead: TypeAlias = Callable[[Float[jax.Array, "S"], Labels], Any]
