"""Figure 10(b): patch size and image size, with the U-Net head or without, as PATCH,SIDE[,none].

    configs/figure10b.py:8,256          four times the tokens of patch 16
    configs/figure10b.py:32,512         Table 3's model
    configs/figure10b.py:16,512,none    a DiT-only baseline with a smaller patch

Data:      python -m dip_jax prepare --source=folder --from=imagenet/train --image_size=512 --out=datasets/imagenet512
Command:   python -m dip_jax train --config=configs/figure10b.py:32,512 --workdir=runs/figure10b_32_512
Needs:     the teacher of the alignment, dinov2_vitb14_pretrain.pth (README, "The teacher"), named by --config.repa.encoder=FILE
Hardware:  8 GPUs of 48 GB or more; four times that for 1024 tokens (patch 8 at 256, patch 16 at 512)
Expected:  smaller patches are better and dearer; at 512, DiP with patch 32 beats DiT-only with a smaller patch (the paper, as a
           plot without numbers; not reproduced here)
"""

from ml_collections import ConfigDict

from dip_jax.config import defaults


def get_config(arg: str = "16,256") -> ConfigDict:
    words = arg.split(",")
    if len(words) not in (2, 3) or not all(word.isdigit() for word in words[:2]) or words[2:] not in ([], ["none"]):
        raise ValueError(f"configs/figure10b.py:{arg} is not PATCH,SIDE or PATCH,SIDE,none, such as 32,512")
    patch, side = int(words[0]), int(words[1])
    config = defaults()
    config.model.update(patch_size=patch, image_size=(side, side), head=words[2] if words[2:] else "unet")
    config.repa.update(weight=0.5, encoder="dinov2_vitb14_pretrain.pth")
    config.data.update(path=f"datasets/imagenet{side}", source="folder")
    config.eval.update(features="inception", weights="classify_image_graph_def.pb", num_samples=50_000)
    config.eval.reference = "VIRTUAL_imagenet512.npz" if side == 512 else f"VIRTUAL_imagenet{side}_labeled.npz"
    return config
