"""A run to check an installation, a machine or a change against: the paper's objective and initial values, a tiny model.

    configs/reference.py         64x64, 10,000 steps of 16 crops
    configs/reference.py:256     256x256, 300 steps of 4 crops

Data:      python -m dip_jax prepare --source=photo_crops --out=datasets/photo_crops
           python -m dip_jax prepare --source=photo_crops --image_size=256 --encoding=tiff --out=datasets/photo_crops_256
Command:   python -m dip_jax train --config=configs/reference.py --workdir=runs/reference
Hardware:  2 CPU cores, 2 GiB of memory
Expected:  about ten minutes, one for 256; the losses of docs/reference_curves.md
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults

SIZES = {"64": ((64, 64), "datasets/photo_crops", 16, 10_000), "256": ((256, 256), "datasets/photo_crops_256", 4, 300)}


def get_config(arg: str = "64") -> ConfigDict:
    if arg not in SIZES:
        raise ValueError(f"configs/reference.py:{arg} is none of {', '.join(SIZES)}")
    image_size, path, batch_size, steps = SIZES[arg]
    config = defaults()
    config.model.update(size="tiny", image_size=image_size, num_classes=10, width=128, depth=4, num_heads=2, head_width=8)
    config.model.update(dtype="float32", remat="none", head_remat=False, scan_layers=False)
    config.optim.update(learning_rate=1e-3)
    config.data.update(path=path, source="photo_crops", batch_size=batch_size, num_threads=2)
    config.checkpoint.update(every_steps=1000, keep_last=1)
    config.train.update(steps=steps, log_every=1, sample_every=0)
    return config
