"""Runs the public ADM evaluator's own numpy and scipy code beside ours, on the same activations.

    python benchmarks/adm_parity.py --evaluator=CHECKOUT [--sizes=96,512] [--out=benchmarks/results/adm_parity.json]

CHECKOUT is a clone of https://github.com/openai/guided-diffusion; its evaluations/evaluator.py is imported as it is, with an
empty module in TensorFlow's place. What it leaves to TensorFlow is given to it in numpy: the softmax (float64) and the pairwise
distances, in three ways: float64, float32, and as published, float16 with float32 where that overflows.

Printed and recorded for each size: FID and sFID on well-conditioned statistics (bound 1e-6, relative), Inception Score over
splits (1e-6), precision and recall (equal in float64; how far the published float16 is off). On degenerate activations, where
its matrix square root is inaccurate, both sides are held against a reference that needs none.
"""

import argparse
import importlib.util
import json
import pathlib
import platform
import sys
import types
import warnings
from typing import Any

import checkouts
import numpy as np
import scipy

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from dip_jax.metrics import statistics  # noqa: E402

BOUND = 1e-6
CLASSES = 1008


def load_evaluator(checkout: pathlib.Path) -> Any:
    """Its evaluator as a module, without TensorFlow."""
    tensorflow = types.ModuleType("tensorflow")
    compat = types.ModuleType("tensorflow.compat")
    compat.v1 = tensorflow.v1 = types.ModuleType("tensorflow.compat.v1")
    sys.modules |= {"tensorflow": tensorflow, "tensorflow.compat": compat, "tensorflow.compat.v1": compat.v1}
    sys.modules.setdefault("requests", types.ModuleType("requests"))
    spec = importlib.util.spec_from_file_location("evaluator", checkout / "evaluations" / "evaluator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Distances:
    """The evaluator's `DistanceBlock` in numpy; `kind` is float64, float32 or published."""

    kind = "float64"

    def __init__(self, session: Any):
        del session

    def pairwise_distances(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        if self.kind == "published":
            half = _squared(u.astype(np.float16), v.astype(np.float16))
            return half.astype(np.float32) if np.isfinite(half).all() else _squared(u, v)
        return _squared(u.astype(self.kind), v.astype(self.kind))

    def less_thans(self, u, u_radii, v, v_radii):
        distances = self.pairwise_distances(u, v).astype(np.float32)[..., None]
        return (distances <= v_radii).any(axis=1), (distances <= u_radii[:, None]).any(axis=0)


def _squared(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """|u|^2 - 2 u v + |v|^2 in the operands' type; products of float16 are added up in float32, as on a GPU."""
    product = (u.astype(np.float32) @ v.T.astype(np.float32)).astype(u.dtype) if u.dtype == np.float16 else u @ v.T
    norms = np.square(u).sum(axis=1)[:, None] + np.square(v).sum(axis=1)[None]
    return np.maximum(norms - 2 * product, 0)


class Softmax:
    """A session whose only graph is a softmax."""

    def run(self, graph: Any, feed_dict: dict[str, np.ndarray]) -> np.ndarray:
        logits = feed_dict["input"].astype(np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)


def activations(seed: int, count: int, d: int, *, shift: float = 0.0) -> np.ndarray:
    """Correlated, skewed, non-negative float32 features, as a ReLU network gives."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    return np.maximum(rng.normal(size=(count, d)) @ mix + 0.5 + shift, 0).astype(np.float32)


def gaussian(rows: np.ndarray) -> statistics.Gaussian:
    total = statistics.Moments(rows.shape[1])
    for start in range(0, len(rows), 100):
        total.add(rows[start : start + 100])
    return total.finish()


def their_statistics(module: Any, rows: np.ndarray) -> Any:
    return module.Evaluator.compute_statistics(None, rows.astype(np.float64))


def exact_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance without a matrix square root: tr (S1 S2)^(1/2) is the nuclear norm of X Y^T, X and Y centred."""
    x, y = ((rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in (a.astype(np.float64), b.astype(np.float64)))
    shift = a.astype(np.float64).mean(axis=0) - b.astype(np.float64).mean(axis=0)
    return float(shift @ shift + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-300)


def compare(module: Any, d: int) -> dict[str, float]:
    samples, references = activations(1, 8 * d, d, shift=0.05), activations(2, 6 * d, d)
    theirs = their_statistics(module, samples).frechet_distance(their_statistics(module, references))
    found = {"fid": relative(statistics.frechet_distance(gaussian(samples), gaussian(references)), theirs)}
    narrow = slice(0, d - d // 8)  # other dimensions, as sFID's
    theirs = their_statistics(module, samples[:, narrow]).frechet_distance(their_statistics(module, references[:, narrow]))
    found["sfid"] = relative(statistics.frechet_distance(gaussian(samples[:, narrow]), gaussian(references[:, narrow])), theirs)
    logits = 3 * np.random.default_rng(3).normal(size=(12 * d, CLASSES)).astype(np.float32)
    fake = types.SimpleNamespace(softmax_batch_size=512, softmax=None, softmax_input="input", sess=Softmax())
    for split in (5000, 2 * d):
        theirs = module.Evaluator.compute_inception_score(fake, logits, split_size=split)
        found[f"is_split_{split}"] = relative(statistics.inception_score(logits, split=split), theirs)
    ours = statistics.precision_recall(samples, references)
    found |= {"precision": ours.precision, "recall": ours.recall}
    for Distances.kind in ("float64", "float32", "published"):
        manifold = module.ManifoldEstimator(None)
        radii = manifold.manifold_radii(references), manifold.manifold_radii(samples)
        precision, recall = manifold.evaluate_pr(references, radii[0], samples, radii[1])
        found |= {f"precision_{Distances.kind}": float(precision[0]), f"recall_{Distances.kind}": float(recall[0])}
    return found


def compare_degenerate(module: Any, d: int) -> dict[str, float]:
    """Relative differences from the exact value, ours and theirs, where covariances are singular."""
    few = activations(4, d // 2, d), activations(5, d // 3, d, shift=0.1)
    twice = np.repeat(activations(6, d // 4, d), 8, axis=0), activations(7, 2 * d, d)
    flat = activations(8, 3 * d, d), activations(9, 3 * d, d, shift=0.1)
    for rows in flat:
        rows[:, : d // 3] = 1.0
    found = {}
    for name, (a, b) in {"fewer_than_d": few, "duplicated_rows": twice, "constant_features": flat}.items():
        exact = exact_distance(a, b)
        found[f"{name}_ours"] = relative(statistics.frechet_distance(gaussian(a), gaussian(b)), exact)
        try:
            theirs = their_statistics(module, a).frechet_distance(their_statistics(module, b))
            found[f"{name}_evaluator"] = relative(theirs, exact)
        except ValueError:  # "Imaginary component"
            found[f"{name}_evaluator"] = float("nan")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluator", type=pathlib.Path, required=True, help="clone of openai/guided-diffusion")
    parser.add_argument("--sizes", default="96,512", help="feature dimensions")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    options = parser.parse_args()
    checkouts.require("evaluator", options.evaluator, of="openai/guided-diffusion", files=["evaluations/evaluator.py"])
    warnings.simplefilter("ignore", DeprecationWarning)  # of the evaluator's own calls
    module = load_evaluator(options.evaluator)
    module.DistanceBlock = Distances
    results, worst = {}, 0.0
    for d in map(int, options.sizes.split(",")):
        found = compare(module, d) | compare_degenerate(module, d)
        results[str(d)] = found
        worst = max(worst, *(found[key] for key in found if key.startswith(("fid", "sfid", "is_")) or key.endswith("_ours")))
        equal = all(found[name] == found[f"{name}_float64"] for name in ("precision", "recall"))
        worst = worst if equal else float("inf")
        for name, value in found.items():
            print(f"d={d:<5} {name:<30} " + (f"{value:.6f}" if name.startswith(("precision", "recall")) else f"{value:.1e}"))
    print(f"worst difference {worst:.1e}, bound {BOUND:.0e}; precision and recall equal: {worst < np.inf}")
    if options.out:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
        record = {"command": " ".join(sys.argv[1:]), "versions": versions, "bound": BOUND, "worst": worst, "results": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
