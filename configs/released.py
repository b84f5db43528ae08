"""The small model of `released/`: the demo's ten photographs, the paper's placement and the authors' U-Net, trained for longer.

Command:   python -m dip_jax train --config=configs/released.py --workdir=runs/released
Hardware:  2 CPU cores, 3 GiB of memory
Expected:  an hour on two quiet cores; numbers in released/README.md
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    # After the blocks, as in the paper. A quarter million patches an hour are too few for its initial values to grow out of.
    config.model.update(size="tiny", image_size=(64, 64), num_classes=10, head_width=24, head_init="he")
    # Predicting the image rather than the velocity learns fastest when patches (768 numbers) are wider than the tokens (192).
    config.model.update(prediction="x", t_clip=0.3, label_std=0.4, position="rope+sincos")
    # Two CPU cores: no bfloat16 units, little to gain from recomputation, and unrolled layers run faster.
    config.model.update(dtype="float32", remat="none", head_remat=False, scan_layers=False)
    config.flow.update(t_mean=-0.5)
    config.optim.update(
        learning_rate=2e-3, warmup_steps=400, schedule="cosine", grad_clip=1.0, ema_decays=(0.999,), ema_warmup=True
    )
    config.data.update(path="datasets/photo_crops", source="photo_crops", batch_size=16, num_threads=2)
    config.checkpoint.update(every_steps=1000, keep_last=2)
    config.sample.update(steps=32, t_shift=2.0, guidance=2.0, interval=(0.0, 0.7), batch_size=100)
    config.eval.update(reference="datasets/photo_crops/validation", num_samples=500)
    config.train.update(steps=18_000, log_every=100, sample_every=6000)
    return config
