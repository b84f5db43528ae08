"""What a checkpoint costs: how long a save holds training up, and how much of save and restore goes into the manifest.

    python benchmarks/checkpoint_cost.py [--rounds=3] [--folder=/tmp/checkpoint_cost]

Trains a model whose state (parameters, two moments, average) is one GiB, in steps as small as make sense, so that the stall is
compared with a short step. Medians over the rounds, of seconds that pass and of seconds of processor time: shares of the latter
do not depend on what else the machine does. The result goes to benchmarks/results/checkpoint_cost.json.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import time
from unittest import mock

import jax
import numpy as np

from dip_jax import config
from dip_jax.checkpoints import checkpoint, manifest
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.training import optim, state
from dip_jax.training.step import compile_train_step

# 12 blocks' width at half their number: 1.0 GiB with the optimizer and the average. 16 tokens of 16x16 pixels an image.
MODEL = config.Model(size="B", depth=6, image_size=(64, 64), remat="none")
BATCH = 16
RESULT = pathlib.Path(__file__).parent / "results" / "checkpoint_cost.json"


def measure(rounds: int, folder: pathlib.Path) -> dict[str, float]:
    """Medians of a step and of the parts of save and restore, and their shares."""
    mesh = sharding.make_mesh(config.Mesh())
    with jax.set_mesh(mesh), sharding.use_rules(config.Mesh().rules):
        model = dip.from_config(MODEL)
        optimizer = optim.make_optimizer(config.Optim(), total_steps=100)
        shardings = state.state_shardings(model, optimizer, mesh, zero1=False)
        step = compile_train_step(model, optimizer, shardings, mesh, objective=config.Flow(), optim=config.Optim())
        target = state.abstract_state(model, optimizer, shardings)
        carry, key = state.init_sharded(model, optimizer, 0, shardings), jax.random.key(0)
        rng = np.random.default_rng(0)
        batch = jax.device_put(
            {
                "image": rng.integers(0, 256, (BATCH, *MODEL.image_size, 3), np.uint8),
                "label": rng.integers(0, MODEL.num_classes, BATCH, np.int32),
            }
        )
        carry, metrics = jax.block_until_ready(step(carry, batch, key))  # compiles
        record = checkpoint.Record(config.Config(model=MODEL), {})
        times: dict[str, list[tuple[float, float]]] = {}  # that passed, and of all cores

        def clock(name, action):
            start, worked = time.perf_counter(), time.process_time()
            result = action()
            times.setdefault(name, []).append((time.perf_counter() - start, time.process_time() - worked))
            return result

        def save(number, carry):
            clock("save_holds_training", lambda: checkpoints.save(number, carry, record))
            checkpoints.wait()

        original = manifest.write_manifest
        shutil.rmtree(folder, ignore_errors=True)
        with mock.patch.object(manifest, "write_manifest", lambda path: clock("manifest", lambda: original(path))):
            checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint(keep_last=1))
            for number in range(rounds):
                for _ in range(2):
                    carry, metrics = clock("step", lambda c=carry: jax.block_until_ready(step(c, batch, key)))
                clock("save", lambda n=number, c=carry: save(n, c))
                found = clock("verify", checkpoints.find)
                clock("restore", lambda f=found: jax.block_until_ready(checkpoints.restore(f, target)))
            checkpoints.close()
    shutil.rmtree(folder, ignore_errors=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(carry))
    medians, shares = {}, {}
    for which, kind in enumerate(("", "processor_")):
        median = {name: statistics.median(row[which] for row in rows) for name, rows in times.items()}
        medians |= {f"{name}_{kind}seconds": round(value, 4) for name, value in median.items()}
        shares[f"manifest_{kind}share_of_save"] = round(median["manifest"] / median["save"], 4)
        shares[f"verify_{kind}share_of_restore"] = round(median["verify"] / (median["verify"] + median["restore"]), 4)
    shares["steps_lost_per_save"] = round(medians["save_holds_training_seconds"] / medians["step_seconds"], 3)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "manifest": manifest.MANIFEST,
    }
    return {"machine": machine, "gibibytes": round(size / 2**30, 3), "rounds": rounds, **medians, **shares}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/checkpoint_cost"))
    arguments = parser.parse_args()
    result = json.dumps(measure(arguments.rounds, arguments.folder), indent=1)
    print(result)
    RESULT.write_text(result + "\n")
