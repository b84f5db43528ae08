"""Representation alignment: the teacher and its part of the loss."""

from dataclasses import dataclass

from dip_jax.config.checks import not_negative, one_of, positive


@dataclass(frozen=True)
class Repa:
    """REPA (Yu et al. 2024; the paper's appendix C): tokens of one block are drawn to those of a frozen DINOv2."""

    weight: float = 0.0  # of the alignment beside the flow loss; 0 is off, the paper's recipe has 0.5
    encoder: str = ""  # your file of the teacher's weights, such as dinov2_vitb14_pretrain.pth
    layer: int = 8  # the tokens after this block, counted from 1
    projector: str = "mlp"  # mlp (REPA: three linear maps) | conv (iREPA: one 3x3 convolution over the token grid)
    spatial_norm: bool = False  # iREPA: the teacher's tokens are normalised over each image first

    def __post_init__(self):
        not_negative("repa", self, "weight")
        positive("repa", self, "layer")
        one_of("repa.projector", self.projector, ("mlp", "conv"))
