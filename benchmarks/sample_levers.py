"""Latency of one compiled trajectory without and with what sampling does once instead of at every step.

    python benchmarks/sample_levers.py [--size=S] [--image_size=256] [--batch=1] [--steps=8] [--dtype=float32] [--rounds=7]
    python benchmarks/sample_levers.py --size=XL --steps=100 --dtype=bfloat16        on a GPU

    plain   modulations made in every block at every step, float32 weights converted where they are used
    ahead   modulations of all steps made before the first one (`model.modulations`)
    cast    weights converted to the compute dtype before the first step (`model.cast`); for bfloat16 only
    both    what `drawing` does

All variants run in turn, round after round. A time is the median of the process's CPU seconds, on a GPU of wall seconds, with
its quartiles; "speed" is plain's time by the variant's, round by round, likewise. Differences of the images are printed too.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from dip_jax import config
from dip_jax.models import dip


def compile_variants(options: argparse.Namespace) -> dict[str, Callable[[], jax.Array]]:
    """By name, a call that draws one batch."""
    model = dip.build(f"DiP-{options.size}/16", image_size=options.image_size, dtype=options.dtype)
    params = measuring.make_drawing_weights(model)
    sample = config.Sample(steps=options.steps, batch_size=options.batch)
    indices = jnp.arange(options.batch, dtype=jnp.int32)
    calls = {}
    names = ("plain", "ahead") if options.dtype == "float32" else ("plain", "both", "ahead", "cast")
    for name, _ in measuring.within(options.minutes, dict.fromkeys(names)):
        weights = jax.jit(model.cast)(params) if name in ("cast", "both") else params
        draw = jax.jit(measuring.trajectory(model, sample, ahead=name in ("ahead", "both")))
        calls[name] = functools.partial(draw.lower(weights, indices).compile(), weights, indices)
    return calls


def measure(options: argparse.Namespace) -> list[dict]:
    """A row per variant: seconds, speed and largest relative difference of the images beside plain."""
    calls = compile_variants(options)
    images = {name: np.asarray(draw()) for name, draw in calls.items()}
    plain = images["plain"]
    return [
        {"variant": name, **taken, "difference": float(np.abs(images[name] - plain).max() / np.abs(plain).max())}
        for name, taken in measuring.interleave(calls, rounds=options.rounds).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", help="row of config.SIZES")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, default in (("image_size", 256), ("batch", 1), ("steps", 8), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--minutes", type=float, default=5.0, help="no further variant is compiled after so long")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with measuring.one_device():
        rows = measure(options)
    keys = ("variant", "seconds", "low", "high", "speed", "speed_low", "speed_high", "difference")
    print(measuring.table(keys, [[row[key] for key in keys] for row in rows]))
    asked = measuring.asked(options)
    measuring.save("sample_levers", asked, rows, out=options.out)


if __name__ == "__main__":
    main()
