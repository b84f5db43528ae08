"""How fast images become features, and what 50,000 of them cost: time, and memory above the start.

    python benchmarks/features.py --what=lite0       images/s at both input sizes
    python benchmarks/features.py --what=inception   beside torch-fidelity's copy of pytorch-fid's network, in turns
                                                     (pip install torch torchvision torch-fidelity)
    python benchmarks/features.py --what=moments     --count vectors of 2048 from a generator: moments, then FID
    python benchmarks/features.py --what=precision   precision and recall of --count samples against 10,000 references

Inception's weights are random: speed does not depend on them.
"""

import argparse
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from dip_jax.metrics import inception, lite0, statistics

PASSES = 5
_D = inception.DIMENSIONS["pool"]


def megabytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def pixels(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def run_lite0(count: int) -> None:
    params = lite0.load()
    for size in (64, 256):
        batch = pixels(count, size)
        rates = [count / seconds(lambda b=batch: lite0.features(params, b)) for _ in range(PASSES + 1)][1:]
        print(f"lite0: {np.median(rates):.1f} images/s of {size} px, entering at {lite0.input_size(size, size)} px")


def run_inception(count: int) -> None:
    """Both networks on the same 299 px batch, so that neither resizes, in alternating order."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        load, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, lambda *_: None
        torch.save({}, file.name)
        network = FeatureExtractorInceptionV3("", ["2048"], feature_extractor_weights_path=file.name).eval()
        FeatureExtractorInceptionV3.load_state_dict = load
        torch.save(network.state_dict(), file.name)
        params = inception.load(file.name)
    batch = pixels(count, inception.SIZE)
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return network(tensor)[0].numpy()

    sides = {"ours": lambda: inception.features(params, batch), "theirs": theirs}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        seconds(side)  # compiles, warms up
    for k in range(PASSES):
        for name in list(sides)[:: 1 if k % 2 else -1]:
            times[name].append(seconds(sides[name]))
    ratios = np.array(times["theirs"]) / np.array(times["ours"])
    for name, taken in times.items():
        print(f"inception {name}: {count / np.median(taken):.2f} images/s, passes {[round(count / t, 2) for t in taken]}")
    print(f"inception: ours is {np.median(ratios):.2f} times as fast (passes {np.round(ratios, 2).tolist()})")


def run_moments(count: int) -> None:
    rng = np.random.default_rng(0)
    scale = np.exp(-np.arange(_D) / 400).astype(np.float32)
    start, before = time.perf_counter(), megabytes()
    sides = []
    for shift in (0.0, 0.05):
        total = statistics.Moments(_D)
        for number in range(1, count // 100 + 1):
            total.add(rng.standard_normal((100, _D), np.float32) * scale + np.float32(shift))
            if number % max(count // 500, 1) == 0:
                seen = f"{100 * number} vectors of {_D}, in all {time.perf_counter() - start:.1f} s"
                print(f"moments: {seen}, {megabytes() - before:.0f} MB", flush=True)
        sides.append(total.finish())
    start = time.perf_counter()
    distance = statistics.frechet_distance(*sides)
    print(f"FID: {distance:.6f} in {time.perf_counter() - start:.1f} s, {megabytes() - before:.0f} MB")


def run_precision(count: int) -> None:
    rng = np.random.default_rng(0)
    samples, references = (rng.standard_normal((n, _D), np.float32) for n in (count, 10_000))
    start, before = time.perf_counter(), megabytes()
    found = statistics.precision_recall(samples, references)
    taken = time.perf_counter() - start
    print(f"{found}: {count} against 10000 vectors of {_D} in {taken:.1f} s, {megabytes() - before:.0f} MB above the vectors")


RUNS = {"lite0": (run_lite0, 50), "inception": (run_inception, 8), "moments": (run_moments, 50_000)}
RUNS |= {"precision": (run_precision, 50_000)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=RUNS, required=True)
    parser.add_argument("--count", type=int, help="images or vectors")
    options = parser.parse_args()
    function, default = RUNS[options.what]
    function(options.count or default)
