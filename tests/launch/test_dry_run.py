"""`--dry-run` of every launcher: pasted into a shell, what it prints starts the same programs in the same environment."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
from places import ROOT

# Stands in for a program: writes down how it is called, one file per call, but for questions.
RECORDER = """#!/bin/bash
case $1 in -c) exec {python} "$@" ;; -L) printf 'GPU %s\\n' 0: 1:; exit ;; show) echo 'NodeAddr=10.0.0.1'; exit ;; esac
{{ printf '%s\\n' "${{0##*/}}" "$@"; env | grep -vE '^(SHLVL|_|PWD|OLDPWD)=' | sort; }} >"$(mktemp "$RECORD/XXXXXX")"
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
LAUNCHERS = {
    "local": ("local.sh", ["train", "--config=a b.py"], {}),
    "local, chosen": ("local.sh", ["--accelerator=cuda", "info", "--x"], {"XLA_FLAGS": "--xla=1 2", "NCCL_DEBUG": "INFO"}),
    "local, several": ("local.sh", ["--processes=2", "--logs=my logs", "train", "--config=a b.py"], {}),
    "slurm": ("slurm.sbatch", ["train", "--config=a b.py"], JOB),
    "demo": ("demo.sh", ["--workdir=my run", "--config.train.steps=2"], {}),
    "install": ("install.sh", ["--accelerator=cpu", "--extra", "test"], {}),
    "test": ("test.sh", ["-k", "a b"], {}),
}


class Checkout:
    """The launchers in a folder of their own, with recorders in the place of every program that they start."""

    def __init__(self, folder: pathlib.Path):
        self.root, self._record, self._folder = folder / "a checkout", folder / "record", folder
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for name in (
            "bin/uv",
            "bin/srun",
            "bin/scontrol",
            "bin/nvidia-smi",
            "a checkout/.venv/bin/python",
            "a checkout/.venv/bin/ruff",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(RECORDER.format(python=shutil.which("python3")))
            (folder / name).chmod(0o755)
        for name in ("record", "home", "tmp"):
            (folder / name).mkdir()

    def bash(self, *argv: str, **env: str) -> str:
        env |= {"PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self._folder / "home")}
        env |= {"RECORD": str(self._record), "TMPDIR": str(self._folder / "tmp")}
        done = subprocess.run(["bash", *argv], cwd=self.root, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def recorded(self) -> list[str]:
        """The calls so far, forgotten by this; the port of a coordinator is another every time."""
        texts = [re.sub(r"(COORDINATOR_ADDRESS=)\S+", r"\1", file.read_text()) for file in self._record.iterdir()]
        for file in self._record.iterdir():
            file.unlink()
        return sorted(texts)

    def files(self) -> dict[pathlib.Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in self._folder.rglob("*")}


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_is_printed_is_what_is_run(checkout, name):
    script, argv, env = LAUNCHERS[name]
    before = checkout.files()
    printed = checkout.bash(f"launch/{script}", *argv, "--dry-run", **env)
    assert (
        checkout.bash(f"launch/{script}", "--dry-run", *argv, **env).split("=127.0.0.1:")[0] == printed.split("=127.0.0.1:")[0]
    )
    assert checkout.files() == before and checkout.recorded() == []
    checkout.bash("-c", f"{printed}\nwait", **env)
    pasted = checkout.recorded()
    shutil.rmtree(checkout.root / "logs", ignore_errors=True)
    (checkout.root / ".venv" / ".dip_installed").unlink(missing_ok=True)
    checkout.bash(f"launch/{script}", *argv, **env)
    run = checkout.recorded()
    assert run == pasted and len(run) > 0
    assert "a b" not in printed  # as one word


def test_coordinator_and_counts_are_shown(checkout):
    alone = checkout.bash("launch/local.sh", "train", "--dry-run", PYTHON="python")
    assert "COORDINATOR" not in alone
    *_, one, two = checkout.bash("launch/local.sh", "--processes=2", "train", "--dry-run", PYTHON="python").splitlines()
    for i, line in enumerate((one, two)):
        assert re.search(r"JAX_COORDINATOR_ADDRESS=127.0.0.1:\d+ JAX_NUM_PROCESSES=2 ", line)
        assert (
            f"JAX_PROCESS_ID={i} " in line and f"CUDA_VISIBLE_DEVICES={i} " in line and line.endswith(f"process-{i}.log 2>&1 &")
        )
    slurm = checkout.bash("launch/slurm.sbatch", "train", "--dry-run", PYTHON="python", **JOB)
    assert "JAX_COORDINATOR_ADDRESS=FIRST_NODE:20007 " in slurm and "SLURM_STEP_NUM_TASKS" in slurm and ": 2\n" in slurm


def test_the_second_part_of_the_demo_begins_with_the_first(checkout):
    printed = checkout.bash("launch/demo.sh", "--workdir=run", "--dry-run").splitlines()
    first, second = [shlex.split(line) for line in printed if " train " in line]
    (dit,) = [word.removeprefix("--workdir=") for word in first if word.startswith("--workdir=")]
    assert "--config=configs/demo.py:dit" in first and not [word for word in first if "init_from" in word]
    assert {"--config=configs/demo.py", f"--init_from={dit}", f"--workdir={dit.removesuffix('/dit')}"} <= set(second)
    (judged,) = [shlex.split(line) for line in printed if " evaluate " in line]
    assert "--quick" in judged  # the row of the last weights takes a minute of the quarter of an hour


def test_an_environment_that_is_there_needs_nothing(checkout):
    checkout.bash("launch/install.sh", "--accelerator=cpu")
    assert len(checkout.recorded()) == 1
    assert checkout.bash("launch/install.sh", "--accelerator=cpu", "--dry-run").startswith("# nothing to do")
    checkout.bash("launch/install.sh", "--accelerator=cpu")
    assert checkout.recorded() == []
