"""Figure 5: the U-Net head after block 13 of 26 (which block the paper does not say); the DiT's final layer makes the output.

Data:      python -m dip_jax prepare --source=folder --from=imagenet/train --image_size=256 --out=datasets/imagenet256
Command:   python -m dip_jax train --config=configs/figure5_intermediate.py --workdir=runs/figure5_intermediate
Needs:     the teacher of the alignment, dinov2_vitb14_pretrain.pth (README, "The teacher"), named by --config.repa.encoder=FILE
Hardware:  8 GPUs of 48 GB or more; the paper's GPU is not named
Expected:  FID 2.24: better than DiT-only (5.28), not as good as post-hoc (2.16) (the paper; not reproduced here)
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.model.update(placement="intermediate")
    config.repa.update(weight=0.5, encoder="dinov2_vitb14_pretrain.pth")
    config.data.update(path="datasets/imagenet256", source="folder")
    config.eval.update(features="inception", weights="classify_image_graph_def.pb", num_samples=50_000)
    config.eval.reference = "VIRTUAL_imagenet256_labeled.npz"
    return config
