"""How large the experiments are, and the configs that they train. Everything that a scale decides is here."""

from dataclasses import dataclass, field, replace
from typing import Any

from dip_jax.config import Checkpoint, Config, Data, Flow, Mesh, Model, Optim, Sample, Train


@dataclass(frozen=True)
class Scale:
    """One size of all experiments.

    Attributes:
        model: fields of `config.Model` that all runs on the ten photographs share.
        head_sizes: fields of `config.Model` by head, where the head's default is too dear.
        seeds: each run is repeated with these.
        steps, batch_size, learning_rate: of every run on the ten photographs.
        num_samples: images that fid_lite0 is taken on; num_reference: validation images that it is taken against.
        sample: how they are drawn.
        photograph: fields of `config.Model` of Figure 3; photograph_size: side of its image.
        photograph_steps, photograph_batch: its training; photograph_points: how often it is looked at.
        points_per_class: dots per class in the t-SNE pictures.
        widths: base channels of the U-Net in Figure 10.
        patches: patch sizes in Figure 10, on images of 64x64.
        options: attributes of this class that are others in the comparison of options.
    """

    model: dict[str, Any]
    photograph: dict[str, Any]
    head_sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    num_samples: int = 100
    num_reference: int = 400
    sample: Sample = field(default_factory=lambda: Sample(steps=15, guidance=2.0, interval=(0.0, 1.0), batch_size=100))
    photograph_size: int = 256
    photograph_steps: int = 2000
    photograph_batch: int = 1
    photograph_points: int = 10
    points_per_class: int = 40
    widths: tuple[int, ...] = (4, 8, 16)
    patches: tuple[int, ...] = (8, 16, 32)
    options: dict[str, Any] = field(default_factory=dict)


# A few hundred steps: initial values and a position table with which short runs learn (as in configs/demo.py), for all alike.
_SHORT = {"head_init": "he", "label_std": 0.4, "position": "rope+sincos", "t_clip": 0.3}
_CPU = _SHORT | {"size": "tiny", "dtype": "float32", "remat": "none", "head_remat": False}
_GPU = {"size": "S", "dtype": "bfloat16", "remat": "none", "head_remat": False}

SCALES = {
    "cpu": Scale(
        model=_CPU | {"width": 128, "depth": 2, "num_heads": 2},
        photograph=_CPU | {"width": 192, "depth": 2, "num_heads": 3},
        # A patch has 768 numbers whatever the backbone's width is, so the U-Net is half as wide as published, not an eighth:
        # its narrowest map (8 x 32 numbers per patch) holds twice what a token does. The other two are dear enough as they are.
        head_sizes={
            "unet": {"head_width": 32},
            "coord_mlp": {"head_width": 16, "head_depth": 2},
            "attention": {"head_width": 16, "head_depth": 1},
        },
        widths=(8, 16, 32),
        # The options change the backbone or the loss: deeper, without a head, and for longer.
        options={"model": _CPU | {"head": "none", "width": 64, "depth": 3, "num_heads": 2}, "steps": 3000, "num_samples": 200},
    ),
    "gpu": Scale(
        model=_GPU,
        photograph=_GPU | {"width": 1152, "num_heads": 16, "depth": 6},
        steps=20_000,
        batch_size=128,
        learning_rate=4e-4,
        num_samples=5000,
        num_reference=2000,
        sample=Sample(steps=50, guidance=2.0, interval=(0.0, 1.0), batch_size=500),
        photograph_steps=10_000,
        photograph_batch=16,
        photograph_points=20,
        points_per_class=100,
        widths=(16, 32, 64, 128),
    ),
}


def photo_crops_config(scale: Scale, *, seed: int, data: str, **model_fields: Any) -> Config:
    """One run on the ten photographs at 64x64; `model_fields` say what is compared.

    The image is predicted, not the velocity: a velocity has as many numbers as a patch (768), and a backbone narrower than that
    could not carry the noise through its tokens, which would decide every comparison before it began.
    """
    head = model_fields.get("head", "unet")
    fields = {"prediction": "x"} | scale.model | scale.head_sizes.get(head, {}) | model_fields
    base = _config(scale, seed=seed, data=data, steps=scale.steps, batch_size=scale.batch_size)
    model = Model(image_size=(64, 64), num_classes=10, **fields)
    return replace(base, model=model, flow=Flow(t_mean=-0.5), sample=scale.sample)


def photograph_config(scale: Scale, *, data: str, **model_fields: Any) -> Config:
    """One run of Figure 3 on a single photograph: no label is dropped, a checkpoint at every point of the curve."""
    fields = scale.photograph | scale.head_sizes.get(model_fields["head"], {}) | model_fields
    base = _config(scale, seed=0, data=data, steps=scale.photograph_steps, batch_size=scale.photograph_batch)
    every = scale.photograph_steps // scale.photograph_points
    return replace(
        base,
        model=Model(image_size=(scale.photograph_size,) * 2, num_classes=1, **fields),
        flow=Flow(label_dropout=0.0),
        sample=replace(scale.sample, guidance=1.0),
        checkpoint=Checkpoint(every_steps=every, keep_last=1, keep_every=every),
    )


def _config(scale: Scale, *, seed: int, data: str, steps: int, batch_size: int) -> Config:
    optim = Optim(
        learning_rate=scale.learning_rate,
        warmup_steps=steps // 20,
        schedule="cosine",
        grad_clip=1.0,
        ema_decays=(0.995,),
        ema_warmup=True,
    )
    return Config(
        optim=optim,
        data=Data(path=data, batch_size=batch_size, num_threads=2),
        mesh=Mesh(),
        checkpoint=Checkpoint(every_steps=steps, keep_last=1),
        train=Train(steps=steps, seed=seed, log_every=max(steps // 20, 1), sample_every=0),
    )
