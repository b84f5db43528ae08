"""DiP on ten photographs, a DiT first, then the authors' U-Net on what it draws: the whole loop on two CPU cores.

Command:   bash launch/demo.sh
           (python -m dip_jax train --config=configs/demo.py:dit --workdir=runs/demo/dit, then
           python -m dip_jax train --config=configs/demo.py --init_from=runs/demo/dit --workdir=runs/demo)
Hardware:  2 CPU cores, 6 GiB of memory
Expected:  a quarter of an hour; every class plain to see, numbers in README.md
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults

PARTS = ("", "dit")


def get_config(part: str = "") -> ConfigDict:
    """The U-Net on the DiT, or with "dit" that DiT alone."""
    if part not in PARTS:
        raise ValueError(f"configs/demo.py:{part}: {part!r} is not dit")
    config = defaults()
    # A token must hold what is drawn in its patch: 1152 numbers hold 768 in the paper, here 256 hold 192. Patches of 16
    # would leave an image of 64 by 64 pixels 16 tokens, where the paper's has 256.
    config.model.update(size="tiny", depth=4, width=256, num_heads=4, patch_size=8, image_size=(64, 64), num_classes=10)
    # Predicting the image rather than the velocity learns fastest in tokens so narrow; the high floor keeps times close to 1,
    # where there is little left to say, from drowning the others.
    config.model.update(prediction="x", t_clip=0.3)
    # Ten minutes are too few to grow out of small embeddings of classes, or to find the image's borders by attention alone.
    config.model.update(label_std=0.4, position="rope+sincos")
    # Two CPU cores: products of bfloat16 where they have AMX, little to gain from recomputation, unrolled layers run faster.
    config.model.update(dtype="bfloat16", remat="none", head_remat=False, scan_layers=False)
    # More noise than on ImageNet: what a short run lacks is the layout, which is decided there.
    config.flow.update(t_mean=-0.5)
    # A short run: many small steps at a high rate, second moments that follow, and an average that forgets the first weights.
    config.optim.update(learning_rate=2e-3, b2=0.95, grad_clip=1.0, ema_decays=(0.998,), ema_warmup=True)
    config.data.update(path="datasets/photo_crops", source="photo_crops", batch_size=16, num_threads=2)
    config.checkpoint.update(every_steps=500, keep_last=2)
    # Guidance until only detail is left.
    config.sample.update(steps=10, guidance=3.0, interval=(0.0, 0.7), batch_size=100)
    config.eval.update(reference="datasets/photo_crops/validation", num_samples=500)
    if part == "dit":  # half of a step's price is the DiT's: most of what is to be learnt, it learns alone
        config.model.update(head="none")
        config.optim.update(warmup_steps=200)  # constant after that: it decays in the second part alone
        config.train.update(steps=2800, log_every=50, sample_every=2800)
        return config
    # After the blocks, where the paper has it, but added to what the DiT draws, and zero at first: there everything that the
    # DiT knows of a patch need not pass the U-Net's narrowest level, which takes weeks to learn.
    config.model.update(placement="residual", head_width=16, head_init="he", head_zero_init=True, t_clip=0.15)
    config.optim.update(schedule="cosine", warmup_steps=50)
    config.train.update(steps=500, log_every=50, sample_every=0)  # the report shows what it draws
    return config
