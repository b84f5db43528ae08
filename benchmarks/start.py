"""From a new process to the first sample: compiled anew, from the persistent cache, and from an executable made ahead.

    python benchmarks/start.py [--size=S] [--image_size=256] [--steps=50] [--rounds=3]     DiP-S on a CPU
    python benchmarks/start.py --size=XL --steps=100 --dtype=bfloat16                      on a GPU

    cold    nothing is kept
    cache   JAX's persistent cache holds what XLA compiled: traced and lowered again, the program finds it by its hash
    ahead   `jax.experimental.serialize_executable`: nothing is traced; the file fits one machine, one JAX and one batch shape

Every start is a process of its own; the three take turns. "first sample" is the wall time from the model and its weights to the
first image on the host; the columns before it are its parts. Medians over the turns.
"""

import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from jax.experimental import serialize_executable

from dip_jax import config
from dip_jax.models import dip

MODES = ("cold", "cache", "ahead")


def start(mode: str, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, float]:
    """One start in this process: seconds of its parts. A first start of `ahead` makes its file and measures nothing of use."""
    jax.config.update("jax_enable_compilation_cache", mode == "cache")  # what came from the cache cannot be serialised again
    if mode == "cache":
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = dip.build(f"DiP-{options.size}/16", image_size=options.image_size, dtype=options.dtype)
    params = measuring.make_drawing_weights(model)
    draw = measuring.trajectory(model, config.Sample(steps=options.steps, batch_size=1), ahead=True)
    labels, file = jnp.zeros(1, jnp.int32), folder / "executable"
    times = [time.perf_counter()]
    if mode == "ahead" and file.exists():
        times.append(times[0])
        compiled = serialize_executable.deserialize_and_load(
            *pickle.loads(file.read_bytes()), execution_devices=jax.devices()[:1]
        )
    else:
        lowered = jax.jit(draw).lower(params, labels)
        times.append(time.perf_counter())
        compiled = lowered.compile()
    times.append(time.perf_counter())
    image = np.asarray(compiled(params, labels))
    times.append(time.perf_counter())
    if mode == "ahead" and not file.exists():
        file.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    parts = dict(zip(("trace", "compile_or_load", "first_run"), np.diff(times).tolist(), strict=True))
    return parts | {"first_sample": times[-1] - times[0], "sum": float(image.sum())}


def measure(options: argparse.Namespace) -> list[dict]:
    """All modes in turn, each start in a new process; the first turn fills the cache and makes the file."""
    found: dict[str, list[dict]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        for turn in range(options.rounds + 1):
            for mode in MODES:
                command = [sys.executable, __file__, *sys.argv[1:], f"--mode={mode}", f"--folder={folder}/{mode}"]
                os.makedirs(f"{folder}/{mode}", exist_ok=True)
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                if turn:
                    found[mode].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn} of {options.rounds}", file=sys.stderr, flush=True)
    return [
        {"mode": mode} | {key: float(np.median([each[key] for each in starts])) for key in starts[0]}
        for mode, starts in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", help="row of config.SIZES")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, default in (("image_size", 256), ("steps", 50), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        with measuring.one_device():
            print(json.dumps(start(options.mode, options.folder, options)))
        return
    rows = measure(options)
    header = ("start", "trace s", "compile or load s", "first run s", "first sample s")
    keys = ("mode", "trace", "compile_or_load", "first_run", "first_sample")
    print(measuring.table(header, [[row[key] for key in keys] for row in rows]))
    asked = measuring.asked(options, without=("mode", "folder"))
    measuring.save("start", asked, rows, out=options.out, clock="wall seconds")


if __name__ == "__main__":
    main()
