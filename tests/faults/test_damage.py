"""Flipped bits, cut and deleted files: over all files of a checkpoint, none restores wrong numbers, each is passed over."""

import random
import shutil

import jax
import numpy as np
import pytest
from faults import harness

from dip_jax.checkpoints import checkpoint, manifest
from dip_jax.config import Checkpoint

CHANGES = {"train__steps": 4}


@pytest.mark.parametrize(
    "tries", [pytest.param(20, marks=pytest.mark.slow), pytest.param(240, marks=pytest.mark.campaign)], ids=str
)
def test_no_harm_restores_wrong_numbers(reference, tmp_path, tries):
    rng = random.Random(0)
    _, expected = checkpoint.load(reference)
    victims = [path.relative_to(reference) for path in harness.files_of(reference / "checkpoints" / "4")]
    seen = dict.fromkeys(harness.HARMS, 0)
    for number in range(tries):
        workdir = tmp_path / "run"
        shutil.copytree(reference, workdir)
        victim = workdir / victims[number % len(victims)]
        harm = rng.choice(sorted(harness.HARMS)) if victim.stat().st_size else "delete"
        harness.HARMS[harm](victim, rng)
        lines = []
        checkpoints = checkpoint.Checkpoints(workdir, Checkpoint(), report=lines.append)
        found = checkpoints.find()
        checkpoints.close()
        if victim.name == manifest.COMMIT or (victim.name in manifest.LATE and victim.parent.name == "4"):  # read by no restore
            assert found.step == 4
        else:
            assert (found.step, len(lines)) == (2, 1), (victim, harm)
            assert (workdir / "checkpoints" / "damaged" / "4").is_dir()
            seen[harm] += 1
        shutil.rmtree(workdir)
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b), checkpoint.load(reference)[1], expected)
    assert jax.tree.all(equal)
    print(f"{seen} over {len(victims)} files: each seen, set aside, and the step before used")
