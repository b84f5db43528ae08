"""Figure 10(a): depth (stages) and width (base channels) of the U-Net head, as DEPTHxWIDTH.

    configs/figure10a.py:2x64     depth 1 to 4; width any, such as 16, 32, 64, 128

Data:      python -m dip_jax prepare --source=folder --from=imagenet/train --image_size=256 --out=datasets/imagenet256
Command:   python -m dip_jax train --config=configs/figure10a.py:2x64 --workdir=runs/figure10a_2x64
Needs:     the teacher of the alignment, dinov2_vitb14_pretrain.pth (README, "The teacher"), named by --config.repa.encoder=FILE
Hardware:  8 GPUs of 48 GB or more; the paper's GPU is not named
Expected:  better with depth, saturating; no steady gain with width (the paper, as a plot without numbers; not reproduced here)
"""

import re

from ml_collections import ConfigDict

from dip_jax.config import defaults


def get_config(arg: str = "4x64") -> ConfigDict:
    match = re.fullmatch(r"(\d+)x(\d+)", arg)
    if not match:
        raise ValueError(f"configs/figure10a.py:{arg} is not DEPTHxWIDTH, such as 2x64")
    config = defaults()
    config.model.update(head_depth=int(match[1]), head_width=int(match[2]))
    config.repa.update(weight=0.5, encoder="dinov2_vitb14_pretrain.pth")
    config.data.update(path="datasets/imagenet256", source="folder")
    config.eval.update(features="inception", weights="classify_image_graph_def.pb", num_samples=50_000)
    config.eval.reference = "VIRTUAL_imagenet256_labeled.npz"
    return config
