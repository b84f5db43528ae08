"""Table 2: DiT-only, 32 layers of width 1152 (771,953,664 parameters).

Data:      python -m dip_jax prepare --source=folder --from=imagenet/train --image_size=256 --out=datasets/imagenet256
Command:   python -m dip_jax train --config=configs/table2_dit_32x1152.py --workdir=runs/table2_dit_32x1152
Needs:     the teacher of the alignment, dinov2_vitb14_pretrain.pth (README, "The teacher"), named by --config.repa.encoder=FILE
Hardware:  8 GPUs of 48 GB or more; the paper's GPU is not named
Expected:  FID 4.91, sFID 6.44, IS 251.7, precision 0.74, recall 0.56 (the paper; not reproduced here);
           103 x 8 GPU hours, 1.05 s per image
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.model.update(head="none", depth=32)
    config.repa.update(weight=0.5, encoder="dinov2_vitb14_pretrain.pth")
    config.data.update(path="datasets/imagenet256", source="folder")
    config.eval.update(features="inception", weights="classify_image_graph_def.pb", num_samples=50_000)
    config.eval.reference = "VIRTUAL_imagenet256_labeled.npz"
    return config
