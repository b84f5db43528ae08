"""Latency of one compiled trajectory without and with what sampling does once instead of at every step.

    python benchmarks/sample_levers.py [--size=S] [--image_size=256] [--batch=1] [--steps=8] [--dtype=float32] [--rounds=7]
    python benchmarks/sample_levers.py --size=XL --steps=100 --dtype=bfloat16        on a GPU

    plain   modulations made in every block at every step, float32 weights converted where they are used
    ahead   modulations of all steps made before the first one (`model.modulations`)
    cast    weights converted to the compute dtype before the first step (`model.cast`); for bfloat16 only
    both    what `drawing` does

All variants run in turn, round after round; a time is the process's CPU seconds, on a GPU wall seconds; a ratio is the median
over rounds of plain's time by the variant's. Differences of the images are printed too: sums in another order, nothing else.
"""

import argparse
import functools
import json
import pathlib
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from dip_jax import config
from dip_jax.models import dip


def compile_variants(model: dip.DiP, params: Any, options: argparse.Namespace) -> dict[str, Any]:
    sample = config.Sample(steps=options.steps, batch_size=options.batch)
    indices = jnp.arange(options.batch, dtype=jnp.int32)
    names = ("plain", "ahead") if options.dtype == "float32" else ("plain", "ahead", "cast", "both")

    variants = {}
    for name in names:
        weights = jax.jit(model.cast)(params) if name in ("cast", "both") else params
        compiled = (
            jax.jit(measuring.trajectory(model, sample, ahead=name in ("ahead", "both"))).lower(weights, indices).compile()
        )
        variants[name] = functools.partial(compiled, weights, indices)
    return variants


def measure(variants: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    images = {name: np.asarray(draw()) for name, draw in variants.items()}  # warms up
    for turn in range(rounds):
        for name in list(variants)[:: 1 if turn % 2 else -1]:
            start = clock()
            jax.block_until_ready(variants[name]())
            times[name].append(clock() - start)
    return times, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", help="row of config.SIZES")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, default in (("image_size", 256), ("batch", 1), ("steps", 8), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; a run is added to those in it")
    options = parser.parse_args()
    model = dip.build(f"DiP-{options.size}/16", image_size=options.image_size, dtype=options.dtype)
    times, images = measure(compile_variants(model, measuring.drawing_weights(model), options), options.rounds)
    result: dict[str, Any] = {key: getattr(options, key) for key in ("size", "image_size", "batch", "steps", "dtype", "rounds")}
    result |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}
    for name, taken in times.items():
        ratio = np.array(times["plain"]) / np.array(taken)
        spread = [round(float(r), 3) for r in np.percentile(ratio, (25, 75))]
        difference = float(np.abs(images[name] - images["plain"]).max() / np.abs(images["plain"]).max())
        result[name] = {
            "seconds": round(float(np.median(taken)), 4),
            "speed": round(float(np.median(ratio)), 3),
            "quartiles": spread,
            "difference": difference,
        }
        print(
            f"{name:<6} {np.median(taken):8.3f} s  {np.median(ratio):.3f} times as fast {spread}  difference {difference:.1e}"
        )
    if options.out:
        runs = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*runs, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
