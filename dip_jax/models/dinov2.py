"""The teacher of representation alignment: DINOv2 ViT-S/B/L/14 without registers (Oquab et al. 2023), frozen.

For clean images x in [-1, 1] and the model's token grid (h, w):
    z = ((x + 1) / 2 - mean) / std, resized to 14 h x 14 w              (1)
    u_0 = [class; Linear(patches of z)] + positions                     (2)
    u_l = u + g2 * MLP(LN(u)),  u = u_{l-1} + g1 * Attention(LN(u_{l-1})),  l = 1..L     (3)
    y = LN(u_L) without its class token                                 (4)

(1) and the table of positions in (2) are interpolated as PyTorch's bicubic: a = -0.75, edges repeated, no antialiasing. The
resize goes by the ratio of the sizes, the table by the published code's scale factor (n + 0.1) / side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from dip_jax.errors import UserError
from dip_jax.models.layers import attend, layer_norm
from dip_jax.models.linear import dot, unstack
from dip_jax.models.patches import patchify
from dip_jax.models.rounding import spread
from dip_jax.runtime.sharding import constrain
from dip_jax.typing import Images, Params

PATCH = 14  # pixels
_HEAD_WIDTH = 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
_OFFSET = 0.1  # in tokens, what the published code adds to the grid before it takes the table's scale factor
_LISTED = 8  # names in an error message
_TOKENS = ("batch", "tokens", "act_embed")


@dataclasses.dataclass(frozen=True)
class DinoV2:
    """Sizes of the network. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        width: D; 384, 768, 1024 for S, B, L.
        depth: L; 12, 12, 24.
        table_side: side of the square table of positions, 37 in the published files.
    """

    width: int
    depth: int
    table_side: int = 37

    @property
    def num_heads(self) -> int:
        """K: every size has heads of width 64."""
        return self.width // _HEAD_WIDTH


def config_of(tensors: Mapping[str, np.ndarray]) -> DinoV2:
    """Sizes of the network that named tensors hold.

    Raises:
        UserError: for tensors of another network, and for the variants of this one that are no teacher here.
    """
    if "register_tokens" in tensors:
        raise UserError("a DINOv2 with register tokens; the teacher is the one without: dinov2_vit{s,b,l}14_pretrain.pth")
    if any(".mlp.w12." in name for name in tensors):
        raise UserError("a DINOv2 of size g (SwiGLU); the teacher is of size S, B or L: dinov2_vit{s,b,l}14_pretrain.pth")
    shapes = {name: np.shape(tensors.get(name, ())) for name in ("cls_token", "pos_embed")}
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if not blocks or any(len(shape) != 3 for shape in shapes.values()):
        raise UserError(
            f"no DINOv2 as the hub has it: cls_token, pos_embed and blocks.* expected among its {len(tensors)} tensors "
            f"({', '.join(sorted(tensors)[:3])}, ...)"
        )
    width, positions = shapes["cls_token"][2], shapes["pos_embed"][1]
    side = round(max(positions - 1, 1) ** 0.5)
    if width == 0 or width % _HEAD_WIDTH or side * side + 1 != positions:
        raise UserError(
            f"cls_token {list(shapes['cls_token'])}, pos_embed {list(shapes['pos_embed'])}: a width in multiples of "
            f"{_HEAD_WIDTH}, and a class token before a square of positions, expected"
        )
    return DinoV2(width, len(blocks), side)


def tensor_shapes(encoder: DinoV2) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published network."""
    d = encoder.width
    block = {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "ls1.gamma": (d,),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "ls2.gamma": (d,),
    }
    return {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + encoder.table_side**2, d),
        "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (d,),
        **{f"blocks.{i}.{name}": shape for i in range(encoder.depth) for name, shape in block.items()},
        "norm.weight": (d,),
        "norm.bias": (d,),
    }


def from_torch(tensors: Mapping[str, np.ndarray]) -> tuple[DinoV2, Params]:
    """Named tensors of the published network -> its sizes and its parameters, float32 in host memory.

    The parameters are a plain nested dict; those of the blocks carry a leading axis of length L. The mask token, which only
    DINOv2's own training reads, is left out.

    Raises:
        UserError: as `config_of`, or listing every missing, extra or mis-shaped tensor.
    """
    encoder = config_of(tensors)
    wanted = tensor_shapes(encoder)
    wrong = [f"{name}: missing" for name in wanted if name not in tensors]
    wrong += [
        f"{name}: {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    wrong += [f"{name}: extra" for name in sorted(tensors) if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise UserError(f"{len(wrong)} tensors do not fit DINOv2 of width {encoder.width}: {'; '.join(wrong[:_LISTED])}{more}")

    def take(name: str) -> np.ndarray:
        return np.asarray(tensors[name], np.float32)

    def stack(name: str) -> np.ndarray:
        return np.stack([take(f"blocks.{i}.{name}") for i in range(encoder.depth)])

    def linear(name: str, *features: int) -> dict[str, np.ndarray]:
        kernel, bias = stack(f"{name}.weight").transpose(0, 2, 1), stack(f"{name}.bias")
        return {"kernel": kernel.reshape(*kernel.shape[:2], *features), "bias": bias.reshape(len(bias), *features)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    d, (cls, *_) = encoder.width, take("pos_embed")[0]
    return (
        encoder,
        {
            "class": take("cls_token")[0, 0] + cls,  # the only one that its position is ever added to
            "positions": take("pos_embed")[0, 1:].reshape(encoder.table_side, encoder.table_side, d),
            "patch_embed": {
                "kernel": take("patch_embed.proj.weight").transpose(2, 3, 1, 0).reshape(-1, d),
                "bias": take("patch_embed.proj.bias"),
            },
            "blocks": {
                "norm1": norm("norm1"),
                "qkv": linear("attn.qkv", 3, d),
                "proj": linear("attn.proj", d),
                "scale1": stack("ls1.gamma"),
                "norm2": norm("norm2"),
                "up": linear("mlp.fc1", 4 * d),
                "down": linear("mlp.fc2", d),
                "scale2": stack("ls2.gamma"),
            },
            "norm": {"scale": take("norm.weight"), "bias": take("norm.bias")},
        },
    )


def logical_axes() -> Any:
    """The tree of `from_torch` with each array replaced by its tuple of logical axis names (see `sharding.RULES`)."""

    def linear(*axes: str | None) -> dict[str, tuple[str | None, ...]]:
        return {"kernel": ("layers", *axes), "bias": ("layers", *axes[1:])}

    def norm(*lead: str) -> dict[str, tuple[str, ...]]:
        return {"scale": (*lead, "norm"), "bias": (*lead, "norm")}

    return {
        "class": ("embed",),
        "positions": (None, None, "embed"),
        "patch_embed": {"kernel": ("pixels", "embed"), "bias": ("embed",)},
        "blocks": {
            "norm1": norm("layers"),
            "qkv": linear("embed", None, "heads"),
            "proj": linear("heads", "embed"),
            "scale1": ("layers", "norm"),
            "norm2": norm("layers"),
            "up": linear("embed", "mlp"),
            "down": linear("mlp", "embed"),
            "scale2": ("layers", "norm"),
        },
        "norm": norm(),
    }


def patch_tokens(
    encoder: DinoV2, params: Params, images: Images, *, grid: tuple[int, int], dtype: Any = jnp.bfloat16
) -> Float[jax.Array, "B N D"]:
    """Equations (1) to (4): the normalised patch tokens y [B, h * w, D], float32, row-major.

    Args:
        encoder, params: from `from_torch`.
        images: clean images in [-1, 1], [B, H, W, 3], of any size.
        grid: (h, w), the token grid of the model that is aligned: images enter at 14 h x 14 w, 224 x 224 for a grid of 16 x 16
            (256 pixels at P = 16, 512 at P = 32).
        dtype: of products and of the tokens between blocks; interpolation, norms and softmax stay float32.

    The published trainer resizes to 14 / 16 of the image by default, the same size at P = 16; another P needs its option
    `base_patch_size`, or there are more tokens to align to than tokens.
    """
    dtype = jnp.dtype(dtype)
    x = _standardise(images)
    x = _resize(x, *(_bicubic(n, PATCH * m, n / (PATCH * m)) for n, m in zip(images.shape[1:3], grid, strict=True)))
    patches = patchify(x, PATCH)
    rows = constrain(patches.reshape(*patches.shape[:2], -1), "batch", "tokens", "pixels")
    tokens = _linear(params["patch_embed"], rows, dtype)
    tokens = tokens + _positions(encoder, params, grid).astype(dtype)[None]
    first = jnp.broadcast_to(params["class"].astype(dtype)[None, None], (tokens.shape[0], 1, encoder.width))
    tokens = constrain(jnp.concatenate([first, tokens], axis=1), *_TOKENS)

    def step(x: jax.Array, block: Params) -> tuple[jax.Array, None]:
        return constrain(_block(encoder, block, x, dtype), *_TOKENS), None

    tokens, _ = lax.scan(step, tokens, params["blocks"])
    return _norm(params["norm"], tokens)[:, 1:]


def _standardise(images: jax.Array) -> jax.Array:
    mean, std = (spread(jnp.asarray(part, jnp.float32), 4) for part in (_MEAN, _STD))
    return ((images.astype(jnp.float32) + 1) / 2 - mean) / std


def _positions(encoder: DinoV2, params: Params, grid: tuple[int, int]) -> jax.Array:
    """The table for this grid, float32 [h * w, D]; as it is where the grid is its own."""
    side, table = encoder.table_side, params["positions"].astype(jnp.float32)
    if grid != (side, side):
        table = _resize(table[None], *(_bicubic(side, n, side / (n + _OFFSET)) for n in grid))[0]
    return table.reshape(-1, encoder.width)


def _resize(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x [B, H, W, C] by the matrices [h, H] and [w, W], in float32 also where products of float32 are shortened."""
    exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    # Images first: with the matrix before them XLA's GPU compiler, compiling ahead, finds no tiling and ends (jax 0.10.2).
    x = jnp.einsum("bHWc,hH->bhWc", x, rows, **exact)
    return jnp.einsum("bhWc,wW->bhwc", x, columns, **exact)


def _bicubic(length: int, size: int, stride: float) -> np.ndarray:
    """PyTorch's bicubic interpolation from `length` to `size` samples, `stride` apart, as a matrix [size, length], float32.

    Sample i lies at (i + 1/2) * stride - 1/2, rounded as PyTorch does: in 512 pixels float32 is off by up to 3e-5 of a pixel.
    """
    a, weights = -0.75, np.zeros((size, length))
    places = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(stride) - np.float32(0.5)
    start = np.floor(places).astype(int)
    for tap in range(-1, 3):
        far = np.abs(places.astype(np.float64) - (start + tap))
        near = ((a + 2) * far - (a + 3)) * far**2 + 1
        outer = ((far - 5) * far + 8) * far * a - 4 * a
        np.add.at(weights, (np.arange(size), np.clip(start + tap, 0, length - 1)), np.where(far <= 1, near, outer))
    return weights.astype(np.float32)


def _block(encoder: DinoV2, params: Params, x: jax.Array, dtype: Any) -> jax.Array:
    """Equation (3) for one block."""
    gain1, gain2 = (spread(params[name].astype(dtype), x.ndim) for name in ("scale1", "scale2"))
    x = x + gain1 * _attention(encoder, params, _norm(params["norm1"], x), dtype)
    hidden = _linear(params["up"], _norm(params["norm2"], x), dtype)
    hidden = constrain(jax.nn.gelu(hidden, approximate=False), "batch", "tokens", "act_mlp")
    return x + gain2 * _linear(params["down"], hidden, dtype)


def _attention(encoder: DinoV2, params: Params, x: jax.Array, dtype: Any) -> jax.Array:
    qkv = _linear(params["qkv"], x, dtype)
    heads = qkv.reshape(*qkv.shape[:-1], encoder.num_heads, _HEAD_WIDTH)
    q, k, v = (constrain(part, "batch", "tokens", "act_heads", None) for part in unstack(heads, -3))
    y = attend(q, k, v, choice="auto", dtype=dtype, frozen=True)
    return _linear(params["proj"], y.reshape(x.shape), dtype)


def _linear(params: Params, x: jax.Array, dtype: Any) -> jax.Array:
    """x [..., I] times the kernel [I, ...], plus the bias."""
    kernel, bias = params["kernel"].astype(dtype), params["bias"].astype(dtype)
    y = dot(x.astype(dtype), kernel)
    return y + spread(bias, y.ndim)


def _norm(params: Params, x: jax.Array) -> jax.Array:
    """LayerNorm with scale and shift, eps 1e-6, float32 out."""
    return layer_norm(x) * spread(params["scale"], x.ndim) + spread(params["bias"], x.ndim)
