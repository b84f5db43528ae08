"""Runs the published DINOv2 beside the teacher of representation alignment and records its tokens as tests/golden/dinov2.npz.

    python benchmarks/parity_dinov2.py --dinov2=DINOV2_CHECKOUT [--record]

Needs PyTorch (CPU is enough) and a checkout of https://github.com/facebookresearch/dinov2. PyTorch's side normalises, resizes
(torch.nn.functional.interpolate, bicubic) and runs the published network with random weights in float32. Prints, for each case,
the largest difference between the two, relative to the largest magnitude; the bound is 1e-5.
"""

import argparse
import functools
import pathlib
import sys

import checkouts
import jax
import numpy as np

checkouts.require_packages("torch")

import torch  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import dinov2_cases  # noqa: E402

from dip_jax.models import dinov2  # noqa: E402

BOUND = 1e-5
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@torch.no_grad()
def run_torch(case: dinov2_cases.Case) -> np.ndarray:
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer

    encoder = case.encoder
    network = DinoVisionTransformer(
        img_size=14 * encoder.table_side,
        patch_size=14,
        embed_dim=encoder.width,
        depth=encoder.depth,
        num_heads=encoder.num_heads,
        init_values=1.0,
        block_chunks=0,
        block_fn=functools.partial(NestedTensorBlock, attn_class=MemEffAttention),
    ).eval()
    tensors = dinov2_cases.random_tensors(encoder)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=True)
    x = (torch.from_numpy(dinov2_cases.images(case)).permute(0, 3, 1, 2) + 1) / 2
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    size = [int(14 * n / case.patch_size) for n in case.image]
    return network.forward_features(torch.nn.functional.interpolate(x, size, mode="bicubic"))["x_norm_patchtokens"].numpy()


def run_ours(case: dinov2_cases.Case) -> np.ndarray:
    encoder, params = dinov2.from_torch(dinov2_cases.random_tensors(case.encoder))
    tokens = functools.partial(dinov2.patch_tokens, encoder, grid=case.grid, dtype="float32")
    return np.asarray(jax.jit(tokens)(params, dinov2_cases.images(case)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=pathlib.Path, required=True, help="checkout of facebookresearch/dinov2")
    parser.add_argument("--record", action="store_true", help="rewrite tests/golden/dinov2.npz")
    arguments = parser.parse_args()
    files = ["dinov2/layers/__init__.py", "dinov2/models/vision_transformer.py"]
    checkouts.require("dinov2", arguments.dinov2, of="facebookresearch/dinov2", files=files)
    sys.path.insert(0, str(arguments.dinov2))
    recorded, worst = {}, 0.0
    for case in dinov2_cases.CASES:
        theirs, ours = run_torch(case), run_ours(case)
        scale = np.abs(theirs).max()
        difference = np.abs(ours - theirs).max() / scale
        worst = max(worst, difference)
        print(f"{case.name:<18} max |difference| / max |token| = {difference:.2e}   (max |token| {scale:.3f})", flush=True)
        recorded[case.name], recorded[f"{case.name}/scale"] = dinov2_cases.thin(theirs), scale
    if arguments.record:
        np.savez_compressed(dinov2_cases.ANSWERS, **recorded)
    print(f"worst {worst:.2e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
