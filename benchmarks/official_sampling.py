"""Runs the authors' own samplers on a velocity in closed form and records them as tests/golden/official_sampling.npz.

    python benchmarks/official_sampling.py --checkout=DIP_CHECKOUT [--record]

Needs PyTorch (a CPU is enough) and a checkout of https://github.com/NJU-PCALab/DiP, with the files that it shares with its
sibling https://github.com/MCG-NJU/PixNerd taken from there where it lacks them. Without --record, what comes out is compared.
"""

import argparse
import pathlib
import sys

import checkouts
import numpy as np

checkouts.require_packages("torch")

import torch  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import sampling_cases as case  # noqa: E402

THEIRS = [f"src/diffusion/{name}.py" for name in ("base/guidance", "flow_matching/sampling", "flow_matching/scheduling")]


@torch.no_grad()
def run(settings: dict) -> np.ndarray:
    """x before each step and after the last, [steps + 1, *SHAPE]."""
    from src.diffusion.base.guidance import simple_guidance_fn
    from src.diffusion.flow_matching import sampling
    from src.diffusion.flow_matching.scheduling import LinearScheduler

    kind = {"euler": sampling.EulerSampler, "heun": sampling.HeunSampler}[settings["solver"]]
    low, high = settings["interval"]
    sampler = kind(
        scheduler=LinearScheduler(),
        num_steps=settings["steps"],
        guidance=settings["guidance"],
        guidance_interval_min=low,
        guidance_interval_max=high,
        guidance_fn=simple_guidance_fn,
        timeshift=settings.get("t_shift", 1.0),
    )

    def net(x, t, y):
        return case.velocity(torch, x, t, y.float())

    condition = torch.tensor(case.LABELS)
    nothing = torch.full_like(condition, case.NULL_LABEL)
    _, way = sampler(net, torch.from_numpy(case.noise()), condition, nothing, return_x_trajs=True)
    return torch.stack(way).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=pathlib.Path, required=True, help="checkout of NJU-PCALab/DiP")
    parser.add_argument("--record", action="store_true", help="rewrite tests/golden/official_sampling.npz")
    arguments = parser.parse_args()
    checkouts.require("checkout", arguments.checkout, of="NJU-PCALab/DiP", files=THEIRS)
    sys.path.insert(0, str(arguments.checkout))
    found = {name: run(settings) for name, settings in case.CASES.items()}
    if arguments.record:
        np.savez_compressed(case.ANSWERS, **found)
    with np.load(case.ANSWERS) as recorded:
        for name, way in found.items():
            print(f"{name:<40} differs from the record by {np.abs(way - recorded[name]).max():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
