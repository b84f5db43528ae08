"""DiP on ten photographs: the whole loop on a laptop or two CPU cores.

Command:   bash launch/demo.sh
Hardware:  2 CPU cores, 6 GiB of memory
Expected:  a quarter of an hour; every class plain to see, numbers in README.md
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.model.update(size="tiny", image_size=(64, 64), num_classes=10, head_width=16)
    # After the blocks is the paper's choice, for weeks of training. In minutes a linear last layer learns to paint what tokens
    # know, and a U-Net, which hears of a patch in one pixel of its lowest level, does not: here it sits between the blocks.
    config.model.update(placement="intermediate")
    # Predicting the image rather than the velocity learns fastest when patches (768 numbers) are wider than the tokens (192);
    # the high floor keeps times close to 1, where there is little left to say, from drowning the others.
    config.model.update(prediction="x", t_clip=0.3)
    # Ten minutes are too few to grow out of small initial values, or to find the borders of the image by attention alone.
    config.model.update(head_init="he", label_std=0.4, position="rope+sincos")
    # Two CPU cores: no bfloat16 units, little to gain from recomputation, and unrolled layers run faster.
    config.model.update(dtype="float32", remat="none", head_remat=False, scan_layers=False)
    # More noise than on ImageNet: what a short run lacks is the layout, which is decided there.
    config.flow.update(t_mean=-0.5)
    # A short run: many small steps at a high rate that decays, and an average that forgets the first weights.
    config.optim.update(
        learning_rate=2.5e-3, warmup_steps=200, schedule="cosine", grad_clip=1.0, ema_decays=(0.998,), ema_warmup=True
    )
    config.data.update(path="datasets/photo_crops", source="photo_crops", batch_size=16, num_threads=2)
    config.checkpoint.update(every_steps=550, keep_last=2)
    # The layout comes first, in the noise: more steps there, and guidance until only detail is left.
    config.sample.update(steps=16, t_shift=2.0, guidance=4.0, interval=(0.0, 0.7), batch_size=100)
    config.eval.update(reference="datasets/photo_crops/validation", num_samples=500)
    config.train.update(steps=3300, log_every=50, sample_every=1100)
    return config
