"""The tests themselves start where xdist is not installed, and keep each file with one process where it is."""

import subprocess
import sys

import pytest
from places import ROOT


@pytest.mark.parametrize("options, said", [(["-p", "no:xdist"], "collected"), (["-n1", "-v"], "LoadFileScheduling")], ids=str)
def test_pytest_starts(options, said):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "tests/runtime/test_target.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
