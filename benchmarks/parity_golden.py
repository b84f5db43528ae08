"""Runs the public PyTorch modules beside the project and records the outputs of two of them as tests/golden/parity.npz.

    python benchmarks/parity_golden.py --dip=DIP_CHECKOUT --pixnerd=PIXNERD_CHECKOUT --ddt=DDT_CHECKOUT [--record]

Needs PyTorch (CPU is enough) and checkouts of https://github.com/NJU-PCALab/DiP, https://github.com/MCG-NJU/PixNerd and
https://github.com/MCG-NJU/DDT. The weights reach the PyTorch module as a file that `convert --to` writes, by torch.load and
load_state_dict(strict=True). Prints, for each case, the largest difference between their output and ours relative to the
output's largest magnitude; the bound is 2e-5.
"""

import argparse
import importlib.util
import io
import pathlib
import sys

import checkouts
import jax
import numpy as np

checkouts.require_packages("torch")

import torch  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import parity_cases  # noqa: E402

from dip_jax import config  # noqa: E402
from dip_jax.checkpoints import torch_names, torch_writing  # noqa: E402
from dip_jax.models import dip  # noqa: E402

BOUND = 2e-5
MODULES = {
    "dip": "src/models/transformer/dip.py",
    "pixnerd": "src/models/transformer/pixnerd_c2i.py",
    "ddt": "src/models/denoiser/improved_dit.py",
}
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def load_module(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_torch(source: str, model: config.Model, module) -> torch.nn.Module:
    common = {
        "in_channels": 3,
        "num_groups": model.num_heads,
        "hidden_size": model.width,
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
    }
    if source == "dip":
        return module.DiP(num_cond_blocks=model.depth, **common)
    if source == "ddt":
        return module.DiT(num_blocks=model.depth, **common)
    blocks = model.depth + model.head_depth
    decoder = {"hidden_size_x": model.head_width, "nerf_mlpratio": 2, "num_blocks": blocks, "num_cond_blocks": model.depth}
    return module.PixNerDiT(**decoder, **common)


@torch.no_grad()
def run_torch(network: torch.nn.Module, tensors: dict[str, np.ndarray], inputs: Inputs) -> np.ndarray:
    file = io.BytesIO(torch_writing.torch_bytes(tensors.items()))
    network.eval().load_state_dict(torch.load(file, weights_only=True), strict=True)
    x, t, y = inputs
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    return network(x, torch.from_numpy(t), torch.from_numpy(y).long()).numpy().transpose(0, 2, 3, 1)


def run_ours(source: str, model: config.Model, tensors: dict[str, np.ndarray], inputs: Inputs) -> np.ndarray:
    model, params = torch_names.to_params(tensors, source=source, image_size=model.image_size, dtype="float32")
    return np.asarray(jax.jit(dip.from_config(model).apply)(params, *inputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dip", type=pathlib.Path, required=True, help="checkout of NJU-PCALab/DiP")
    parser.add_argument("--pixnerd", type=pathlib.Path, required=True, help="checkout of MCG-NJU/PixNerd")
    parser.add_argument("--ddt", type=pathlib.Path, required=True, help="checkout of MCG-NJU/DDT")
    parser.add_argument("--record", action="store_true", help="rewrite tests/golden/parity.npz")
    arguments = parser.parse_args()
    for source, repository in (("dip", "NJU-PCALab/DiP"), ("pixnerd", "MCG-NJU/PixNerd"), ("ddt", "MCG-NJU/DDT")):
        checkouts.require(source, getattr(arguments, source), of=repository, files=[MODULES[source]])
    cases = {
        case.name: (case.source, case.model, parity_cases.random_tensors(case), parity_cases.inputs(case))
        for case in parity_cases.CASES
    }
    for name in parity_cases.official_cases():
        answers = parity_cases.official_answers(name)
        inputs = answers["x"], answers["t"], answers["y"]
        cases[name] = "dip", parity_cases.official_model(name), parity_cases.official_tensors(name), inputs
    recorded, worst = {}, 0.0
    for name, (source, model, tensors, inputs) in cases.items():
        module = load_module(getattr(arguments, source) / MODULES[source])
        theirs = run_torch(build_torch(source, model, module), tensors, inputs)
        ours = run_ours(source, model, tensors, inputs)
        scale = np.abs(theirs).max()
        difference = np.abs(ours - theirs).max() / scale
        worst = max(worst, difference)
        print(f"{name:<18} max |difference| / max |output| = {difference:.2e}   (max |output| {scale:.3f})", flush=True)
        if source != "dip":
            recorded[name], recorded[f"{name}/scale"] = parity_cases.thin(theirs), scale
    if arguments.record:
        np.savez_compressed(parity_cases.ANSWERS, **recorded)
    print(f"worst {worst:.2e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
