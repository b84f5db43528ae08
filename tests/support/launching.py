"""What the tests of launchers share: a run of a second, and its loss curve."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

from leftovers import kill_at_home
from places import ROOT, SUPPORT
from small_data import write_dataset

STEPS = 12

# What launchers start as PYTHON: dip_jax with slow steps, so that what a test does meets a run in full swing. SLURM's second
# start of a job is not slowed down.
SLOW_PYTHON = """#!{python}
import os
import sys

sys.path[:0] = {path!r}
from dip_jax.__main__ import main
from faults import injections

if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ:
        injections.slow_steps({seconds})
    sys.exit(main(sys.argv[3:]))
"""

CONFIG = """
from dip_jax.config import defaults


def get_config():
    c = defaults()
    c.model.update(size="tiny", depth=1, width=16, num_heads=2, patch_size=8, image_size=(16, 16), num_classes=3)
    c.model.update(head="none", dtype="float32", remat="none")
    c.optim.update(learning_rate=1e-3, ema_decay=0.9)
    c.data.update(path={path!r}, batch_size=8, num_threads=2)
    c.checkpoint.update(every_steps=4, keep_last=3)
    c.sample.update(steps=2, batch_size=8)
    c.train.update(steps={steps}, log_every=1, sample_every=0, watchdog_seconds=300.0)
    return c
"""


def write_config(folder: pathlib.Path, *, steps: int = STEPS) -> pathlib.Path:
    """A config file of a tiny run and the dataset that it reads."""
    write_dataset(folder / "data", 24, size=16, classes=3)
    file = folder / "tiny.py"
    file.write_text(CONFIG.format(path=str(folder / "data"), steps=steps))
    return file


def write_slow_python(folder: pathlib.Path, *, seconds: float = 0.1) -> pathlib.Path:
    """An interpreter for launchers whose training steps take so long, at least."""
    file = folder / "python"
    file.write_text(SLOW_PYTHON.format(python=sys.executable, path=[str(ROOT), str(SUPPORT)], seconds=seconds))
    file.chmod(0o755)
    return file


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """For launchers: this interpreter, CPU devices, a compilation cache that all tests share."""
    cache = os.environ.get("DIP_TEST_CACHE", "/tmp/dip_jax_test_cache") + "_launch"
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return kept | {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }


def launch(*argv: object, timeout: float = 900.0, **env: str) -> subprocess.CompletedProcess:
    """Runs a launcher to its end; past `timeout` seconds it and all that it started are killed."""
    command = ["bash", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(**env), **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


SLICE = ("--name=dip", "--zone=here", "--poll=0", "--accelerator=cpu")


class Pod:
    """Calls `launch/tpu_pod.sh` with a stand-in for gcloud and two workers whose PYTHON is given; a context manager."""

    def __init__(self, folder: pathlib.Path, *, python: pathlib.Path):
        self.shim = folder / "shim"
        (self.shim / "bin").mkdir(parents=True)
        gcloud = self.shim / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/bash\nexec {sys.executable} -ES {SUPPORT / "gcloud_shim.py"} "$@"\n')
        gcloud.chmod(0o755)
        self._settings = {"SHIM": str(self.shim), "SHIM_WORKERS": "2", "PYTHON": str(python)}
        self._settings |= {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
        self._settings["PATH"] = f"{self.shim / 'bin'}:{environment()['PATH']}"

    def __call__(self, *argv: object, **env: str) -> subprocess.CompletedProcess:
        return launch("launch/tpu_pod.sh", *argv, **(self._settings | env))

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *exc: object) -> None:
        kill_at_home(self.shim)

    def environment(self) -> dict[str, str]:
        return environment(**self._settings)

    def calls(self) -> list[list[str]]:
        """The gcloud calls so far."""
        file = self.shim / "calls"
        return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


def free_address() -> str:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The loss of every step; each must be there once."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), f"steps repeat or run backwards: {steps}"
    return {row["step"]: row["loss"] for row in rows}
