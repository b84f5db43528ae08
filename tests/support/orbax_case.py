"""Trains on to STEPS with whichever Orbax is found first: `python orbax_case.py DATASET WORKDIR STEPS`; prints its version."""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from faults import harness

from dip_jax.checkpoints import checkpoint
from dip_jax.jobs.train import train


def main(dataset: str, workdir: str, steps: str) -> None:
    config = harness.tiny_config(pathlib.Path(dataset), train__steps=int(steps), checkpoint__every_steps=2)
    train(config, workdir=workdir, allow_change=["train.steps"])
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(checkpoint.load(workdir)[1]):
        digest.update(np.asarray(leaf).tobytes())
    print(json.dumps({"orbax": ocp.__version__, "ema": digest.hexdigest()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
