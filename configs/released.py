"""The small model of `released/`: the demo's ten photographs, a DiT first, then the authors' U-Net on what it draws.

Command:   python -m dip_jax train --config=configs/released.py:dit --workdir=runs/released_dit
           python -m dip_jax train --config=configs/released.py --init_from=runs/released_dit --workdir=runs/released
Hardware:  2 CPU cores, 3 GiB of memory
Expected:  two to three hours on two quiet cores, longer beside other work; numbers in released/README.md
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults

PARTS = ("", "dit")


def get_config(part: str = "") -> ConfigDict:
    """The head on the DiT, or with "dit" that DiT alone."""
    if part not in PARTS:
        raise ValueError(f"configs/released.py:{part}: {part!r} is not dit")
    config = defaults()
    # A token must hold what is drawn in its patch: 1152 numbers hold 768 in the paper, here 256 hold 192. Patches of 16
    # would leave an image of 64 by 64 pixels 16 tokens, where the paper's has 256.
    config.model.update(size="tiny", depth=4, width=256, num_heads=4, patch_size=8, image_size=(64, 64), num_classes=10)
    # Predicting the image rather than the velocity learns fastest in tokens so narrow; the high floor keeps times close to 1,
    # where there is little left to say, from drowning the others.
    config.model.update(prediction="x", t_clip=0.3, label_std=0.4, position="rope+sincos")
    # Two CPU cores: products of bfloat16 where they have AMX, little to gain from recomputation, unrolled layers run faster.
    config.model.update(dtype="bfloat16", remat="none", head_remat=False, scan_layers=False)
    config.flow.update(t_mean=-0.5)
    config.optim.update(schedule="cosine", grad_clip=1.0, ema_decays=(0.999,), ema_warmup=True)
    config.data.update(path="datasets/photo_crops", source="photo_crops", batch_size=16, num_threads=2)
    config.checkpoint.update(every_steps=1000, keep_last=2)
    config.sample.update(steps=32, guidance=4.0, interval=(0.0, 0.7), batch_size=100)
    config.eval.update(reference="datasets/photo_crops/validation", num_samples=500)
    if part == "dit":  # half of a step's price is the DiT's: most of what is to be learnt, it learns alone
        config.model.update(head="none")
        config.optim.update(learning_rate=2e-3, warmup_steps=400)
        config.train.update(steps=28_000, log_every=100, sample_every=7000)
        return config
    # The U-Net begins at zero, where the model is the DiT; what it adds it reads from the noisy pixels, mostly at late times.
    config.model.update(placement="residual", head_width=16, head_init="he", head_zero_init=True, t_clip=0.15)
    config.optim.update(learning_rate=1e-3, warmup_steps=100)
    config.train.update(steps=16_000, log_every=100, sample_every=4000)
    return config
