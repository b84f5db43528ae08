"""A training step compiled ahead by one process is found by the training of another, from another checkout: by the folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from faults import harness
from places import ROOT

from dip_jax.config import to_dict

CHILD = """
import json, sys
from dip_jax import config
from dip_jax.jobs import train
from dip_jax.planning import plan
from dip_jax.runtime import compilation, sharding
compilation.keep()
job, text, workdir = sys.argv[1:]
whole = config.from_dict(json.loads(text))
if job == "ahead":  # no array is made
    plan.lower_step(whole, sharding.make_mesh(whole.mesh)).compile()
else:
    train.train(whole, workdir=workdir)
"""


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """Runs the child on a host: its own checkout, home and workdir; returns the training steps kept in the shared folder."""
    folder = tmp_path_factory.mktemp("hosts")

    def run(host: str, job: str, workdir: str = "run", **changes) -> set[str]:
        root = folder / host
        if not root.exists():
            shutil.copytree(ROOT / "dip_jax", root / "dip_jax", ignore=shutil.ignore_patterns("__pycache__"))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": harness.flags(2), "PYTHONPATH": str(root), "HOME": str(root)}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "shared"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        values = {"train__steps": 2, "mesh__data": 2, **changes}
        text = json.dumps(to_dict(harness.tiny_config(dataset, **values)))
        command = [sys.executable, "-c", CHILD, job, text, str(root / workdir)]
        child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
        assert child.returncode == 0, child.stderr[-2000:]
        return {path.name for path in (folder / "shared").glob("jit_train_step-*-cache")}

    return run


def test_training_finds_the_step_that_another_host_compiled_ahead(run):
    ahead = run("laptop", "ahead")
    assert len(ahead) == 1
    assert run("pod", "train") == ahead, "compiled again"


@pytest.mark.slow
def test_another_seed_is_the_same_step_and_another_size_is_not(run):
    kept = run("laptop", "ahead")
    assert run("pod", "train", "again", train__seed=1) == kept, "compiled again"
    for changed in ({"data__batch_size": 4}, {"mesh__zero1": True}, {"optim__learning_rate": 2e-3}):
        more = run("laptop", "ahead", **changed)
        assert len(more - kept) == 1
        kept = more
