"""Runs the public PyTorch modules beside the project and records their outputs as tests/golden/parity.npz.

    python benchmarks/parity_golden.py --pixnerd=PIXNERD_CHECKOUT --ddt=DDT_CHECKOUT [--record]

Needs PyTorch (CPU is enough) and checkouts of https://github.com/MCG-NJU/PixNerd and https://github.com/MCG-NJU/DDT. Prints,
for each case, the largest difference between their output and ours relative to the output's largest magnitude; the bound is
2e-5.
"""

import argparse
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import dataclasses  # noqa: E402

import parity_cases  # noqa: E402

from dip_jax.jobs import convert  # noqa: E402
from dip_jax.models import dip  # noqa: E402

BOUND = 2e-5
MODULES = {"pixnerd": "src/models/transformer/pixnerd_c2i.py", "ddt": "src/models/denoiser/improved_dit.py"}


def load_module(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_torch(case: parity_cases.Case, module) -> torch.nn.Module:
    sizes = case.sizes
    common = {
        "in_channels": 3,
        "num_groups": sizes.num_heads,
        "hidden_size": sizes.width,
        "patch_size": sizes.patch_size,
        "num_classes": sizes.num_classes,
    }
    if case.source == "ddt":
        return module.DiT(num_blocks=sizes.depth, **common)
    blocks = sizes.depth + sizes.head_depth
    decoder = {"hidden_size_x": sizes.head_width, "nerf_mlpratio": 2, "num_blocks": blocks, "num_cond_blocks": sizes.depth}
    return module.PixNerDiT(**decoder, **common)


@torch.no_grad()
def run_torch(case: parity_cases.Case, module) -> np.ndarray:
    network = build_torch(case, module).eval()
    tensors = {name: torch.from_numpy(value) for name, value in parity_cases.random_tensors(case).items()}
    network.load_state_dict(tensors, strict=True)
    x, t, y = parity_cases.inputs(case)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    return network(x, torch.from_numpy(t), torch.from_numpy(y).long()).numpy().transpose(0, 2, 3, 1)


def run_ours(case: parity_cases.Case) -> np.ndarray:
    model, params = convert.from_tensors(parity_cases.random_tensors(case), source=case.source, image_size=case.image_size)
    network = dip.from_config(dataclasses.replace(model, dtype="float32"))
    return np.asarray(jax.jit(network.apply)(params, *parity_cases.inputs(case)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixnerd", type=pathlib.Path, required=True, help="checkout of MCG-NJU/PixNerd")
    parser.add_argument("--ddt", type=pathlib.Path, required=True, help="checkout of MCG-NJU/DDT")
    parser.add_argument("--record", action="store_true", help="rewrite tests/golden/parity.npz")
    arguments = parser.parse_args()
    recorded, worst = {}, 0.0
    for case in parity_cases.CASES:
        theirs = run_torch(case, load_module(getattr(arguments, case.source) / MODULES[case.source]))
        ours = run_ours(case)
        scale = np.abs(theirs).max()
        difference = np.abs(ours - theirs).max() / scale
        worst = max(worst, difference)
        print(f"{case.name:<18} max |difference| / max |output| = {difference:.2e}   (max |output| {scale:.3f})", flush=True)
        recorded[case.name], recorded[f"{case.name}/scale"] = parity_cases.thin(theirs), scale
    if arguments.record:
        np.savez_compressed(parity_cases.ANSWERS, **recorded)
    print(f"worst {worst:.2e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
