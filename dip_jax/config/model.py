"""The network's options, and the published sizes."""

from dataclasses import dataclass

from dip_jax.config.checks import one_of, positive
from dip_jax.errors import UserError

# Backbone sizes: layers, width D, attention heads K (recipe, "Sizes"; tiny is for the demo and the tests).
SIZES = {
    "tiny": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (22, 1024, 16),
    "XL": (26, 1152, 16),
}


@dataclass(frozen=True)
class Model:
    """The network (section 3): DiT backbone, Patch Detailer Head, and where the head sits."""

    size: str = "XL"  # row of SIZES; gives depth, width and num_heads where those are not set
    depth: int | None = None  # L
    width: int | None = None  # D
    num_heads: int | None = None  # K
    patch_size: int = 16  # P: 16 at 256x256, 32 at 512x512
    image_size: tuple[int, ...] = (256, 256)  # (H, W); one number means a square
    num_classes: int = 1000  # label `num_classes` is the null (unconditional) class; 0: `train` takes the dataset's
    head: str = "unet"  # row of models.detailers.HEADS
    placement: str = "post_hoc"  # row of models.placement.PLACEMENTS
    inject_after: int | None = None  # intermediate, hybrid: the head sits after this block; None is half the depth
    head_width: int | None = None  # base channels of the head; None is the head's own default
    head_depth: int | None = None  # stages (U-Net) or blocks (the others); None is the head's own default
    # The authors' U-Net has the first of each; the others are what the demo and the small-scale experiments were made with.
    head_pool: str = "max"  # U-Net: max | avg
    head_upsample: str = "transposed"  # U-Net: transposed (a 2x2 convolution of stride 2) | nearest
    head_feature: str = "silu"  # what the U-Net reads of the backbone: silu (SiLU(t_emb + s)) | raw (s)
    head_init: str = "fan_in"  # how the U-Net's convolutions start: fan_in (variance 1 / (3 fan-in)) | he (2 / fan-in)
    head_zero_init: bool | None = None  # the head's last layer starts at zero; None: the U-Net's does not, the others' do
    position: str = "rope"  # how tokens know their place: rope | rope+sincos (DiT's fixed table joins the embedded patches)
    label_std: float = 0.02  # standard deviation at the start of the label table
    internal: bool = False  # a second output, of the tokens after an early block, for `sample.internal_guidance`
    internal_after: int | None = None  # that block, counted from 1; None is a third of the depth
    context_tokens: int = 0  # tokens of the label that join the image's on their way (JiT has 32); 0 is none
    context_after: int | None = None  # blocks before they join; None is a third of the depth
    prediction: str = "v"  # what the network says: v | x | eps | asym; loss and sampling convert it to the velocity
    subspace_rank: int = 8  # asym: dimensions of a patch in which noise is predicted (models/asym.py); 0 is x, 3 P^2 is v
    t_clip: float = 0.05  # floor of 1 - t (x, asym) and of t (eps) in that conversion
    dtype: str = "bfloat16"  # compute; parameters, norms, softmax, RoPE, t and loss stay float32
    attention: str = "auto"  # auto | xla | cudnn
    scan_layers: bool = True  # one compiled block, scanned; False unrolls
    remat: str = "dots"  # what the backward pass recomputes: none | dots (about all but matrix products) | full
    head_remat: bool = True  # recompute the head in the backward pass

    def __post_init__(self):
        one_of("model.size", self.size, SIZES)
        for name, value in zip(("depth", "width", "num_heads"), SIZES[self.size], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if len(self.image_size) == 1:
            object.__setattr__(self, "image_size", self.image_size * 2)
        if self.inject_after is None:
            object.__setattr__(self, "inject_after", max(self.depth // 2, 1))
        self._check()

    @property
    def internal_block(self) -> int:
        """The block whose tokens the second output reads."""
        return max(self.depth // 3, 1) if self.internal_after is None else self.internal_after

    @property
    def context_start(self) -> int:
        """Blocks before the in-context tokens join; the depth where there are none."""
        if not self.context_tokens:
            return self.depth
        return self.depth // 3 if self.context_after is None else self.context_after

    def _check(self):
        for name in ("depth", "width", "num_heads", "patch_size", "head_width", "head_depth"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        if self.num_classes < 0:
            raise UserError(f"model.num_classes={self.num_classes} must be at least 1, or 0 for as many as the dataset has")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"model.image_size={self.image_size} must be one or two positive numbers (H, W)")
        for side in self.image_size:
            if side % self.patch_size:
                low = max(side - side % self.patch_size, self.patch_size)
                raise UserError(
                    f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}: "
                    f"the nearest side is {low if side % self.patch_size * 2 < self.patch_size else low + self.patch_size}"
                )
        if self.width % self.num_heads or self.width // self.num_heads % 4:
            raise UserError(
                f"model.width={self.width} over model.num_heads={self.num_heads} must give a head width that is a "
                "multiple of 4 (2-D RoPE rotates pairs along two axes)"
            )
        if not 1 <= self.inject_after <= self.depth:
            raise UserError(f"model.inject_after={self.inject_after} must lie in 1..model.depth={self.depth}")
        if not 1 <= self.internal_block <= self.depth:
            raise UserError(f"model.internal_after={self.internal_after} must lie in 1..model.depth={self.depth}")
        if self.context_tokens < 0:
            raise UserError(f"model.context_tokens={self.context_tokens} must not be negative")
        if self.context_tokens and not 0 <= self.context_start < self.depth:
            raise UserError(f"model.context_after={self.context_after} must lie in 0..{self.depth - 1}, below model.depth")
        one_of("model.head_pool", self.head_pool, ("avg", "max"))
        one_of("model.head_upsample", self.head_upsample, ("transposed", "nearest"))
        one_of("model.head_init", self.head_init, ("fan_in", "he"))
        one_of("model.head_feature", self.head_feature, ("raw", "silu"))
        one_of("model.position", self.position, ("rope", "rope+sincos"))
        one_of("model.prediction", self.prediction, ("v", "x", "eps", "asym"))
        if self.prediction == "asym" and not 0 <= self.subspace_rank <= 3 * self.patch_size**2:
            raise UserError(
                f"model.subspace_rank={self.subspace_rank} must lie in 0..{3 * self.patch_size**2}, the numbers in a patch"
            )
        positive("model", self, "t_clip", "label_std")
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.attention", self.attention, ("auto", "xla", "cudnn"))
        one_of("model.remat", self.remat, ("none", "dots", "full"))
