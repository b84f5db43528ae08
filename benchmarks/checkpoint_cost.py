"""What a checkpoint costs: how long a save holds training up, and how much of save and restore goes into the manifest.

    python benchmarks/checkpoint_cost.py [--gibibytes=1] [--rounds=3] [--folder=/tmp/checkpoint_cost]

Prints one JSON object; seconds are medians over the rounds.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import time
from unittest import mock

import jax
import numpy as np

from dip_jax import checkpoint, config, steps
from dip_jax.state import TrainState


def make_state(gibibytes: float) -> TrainState:
    """Random numbers in the proportions of a run: parameters, two moments, average; in pieces of 16 MiB."""
    rng = np.random.default_rng(0)
    pieces = max(int(gibibytes * 2**30 / 4 / 2**24), 1)
    trees = [{f"w{i}": rng.standard_normal((2048, 2048), np.float32) for i in range(pieces)} for _ in range(4)]
    params, mu, nu, ema = jax.device_put(trees)
    return TrainState(step=jax.device_put(np.int32(1)), params=params, opt_state={"mu": mu, "nu": nu}, ema=ema)


def measure(gibibytes: float, rounds: int, folder: pathlib.Path) -> dict[str, float]:
    """Medians of the parts of save and restore."""
    state = make_state(gibibytes)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    record = checkpoint.Record(config.Config(), {})
    times: dict[str, list[float]] = {}

    def clock(name, action):
        start = time.perf_counter()
        result = action()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for number in range(rounds):
        for kind in ("with", "without"):
            shutil.rmtree(folder, ignore_errors=True)
            checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint())
            original = steps.write_manifest

            def write(path, original=original):
                clock("manifest", lambda: original(path))

            patched = write if kind == "with" else lambda path: None
            with mock.patch.object(steps, "write_manifest", patched):
                start = time.perf_counter()
                clock("save_holds_training", lambda c=checkpoints, n=number: c.save(n, state, record))
                checkpoints.wait()
                times.setdefault(f"save_{kind}_manifest", []).append(time.perf_counter() - start)
            if kind == "with":
                clock("verify", lambda c=checkpoints: c.find())
                found = checkpoint.Found(number, checkpoints.root / str(number), record)
                clock("restore", lambda c=checkpoints, f=found: jax.block_until_ready(c.restore(f, target)))
            checkpoints.close()
    shutil.rmtree(folder, ignore_errors=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    shares = {
        "manifest_share_of_save": round(medians["manifest"] / medians["save_with_manifest"], 4),
        "verify_share_of_restore": round(medians["verify"] / (medians["verify"] + medians["restore"]), 4),
    }
    return {"gibibytes": round(size / 2**30, 3), **medians, **shares}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gibibytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/checkpoint_cost"))
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.gibibytes, arguments.rounds, arguments.folder), indent=1))
