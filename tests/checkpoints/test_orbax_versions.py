"""The oldest and the newest Orbax of the pinned range write what the other reads, both ways.

pip install --target=/tmp/orbax_old --no-deps orbax-checkpoint==0.11.30 nest_asyncio
OTHER_ORBAX=/tmp/orbax_old python -m pytest -n0 -s tests/checkpoints/test_orbax_versions.py
"""

import json
import os
import subprocess
import sys

import pytest
from faults import harness
from places import ROOT, SUPPORT

from dip_jax.checkpoints import manifest

OTHER = os.environ.get("OTHER_ORBAX")
pytestmark = pytest.mark.skipif(not OTHER, reason="needs OTHER_ORBAX, a folder with another Orbax")


def go_on(dataset, workdir, steps: int, *, other: bool) -> dict:
    """A new process with one or the other Orbax trains up to `steps` and loads the average."""
    path = os.pathsep.join([*([OTHER] if other else []), str(ROOT), str(SUPPORT)])
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": harness.flags(2)}
    argv = [sys.executable, SUPPORT / "orbax_case.py", dataset, workdir, str(steps)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(words in done.stderr for words in ("going on from step", "is finished")) == (steps > 4)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    go_on(dataset, workdir, 4, other=False)
    return workdir, go_on(dataset, workdir, 8, other=False)


@pytest.mark.parametrize("first", [True, False], ids=["by the other, then by this", "by this, then by the other"])
def test_a_run_goes_on_with_the_other_version(dataset, undisturbed, tmp_path, first):
    workdir = tmp_path / "run"
    began, ended = go_on(dataset, workdir, 4, other=first), go_on(dataset, workdir, 8, other=not first)
    print(f"written by {began['orbax']}, read and gone on with by {ended['orbax']}")
    assert began["orbax"] != ended["orbax"]
    harness.check_curve(workdir, undisturbed[0])
    assert ended["ema"] == undisturbed[1]["ema"]
    for step in harness.steps_of(workdir):
        assert manifest.main([str(workdir / "checkpoints" / str(step))]) == 0
    assert go_on(dataset, workdir, 8, other=first)["ema"] == ended["ema"]  # and what the second wrote the first reads
