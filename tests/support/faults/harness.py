"""Starts real training processes, harms them or their files, and reads what they leave.

A `Nursery` imports the package once and forks a child per run, so that hundreds of runs cost a second or two each. Children
share a compilation cache; nothing else survives from one to the next.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from places import ROOT, SUPPORT

from dip_jax.config import Config, from_dict, to_dict
from dip_jax.data import shards
from dip_jax.runtime import writers

EXACT = ("loss", "grad_norm", "param_norm", "skipped", "replaced")  # columns that a resumed run must repeat bit for bit


def make_dataset(
    folder: pathlib.Path, *, records: int = 48, size: int = 16, classes: int = 3, seed: int = 0, bad: int = 0
) -> pathlib.Path:
    """A small dataset directory of random images, its last `bad` ones of another size, and its path."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    labels = [i % classes for i in range(records)]
    images = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8).tobytes() for _ in labels]
    images[records - bad :] = [b"short"] * bad
    path = folder / "train-00000-of-00001.array_record"
    shard = dataclasses.replace(shards.write_shard(path, zip(labels, images, strict=True)), file=path.name)
    info = shards.DatasetInfo(
        source="random",
        classes=tuple("abcdefghij"[:classes]),
        class_counts=tuple(labels.count(c) for c in range(classes)),
        image_size=size,
        encoding="raw",
        shards=(shard,),
    )
    (folder / shards.DATASET_FILE).write_text(info.to_json())
    return folder


def tiny_config(dataset: pathlib.Path, **changes: object) -> Config:
    """A run that compiles in seconds. `changes` are keys such as `train__steps=7`."""
    values = to_dict(Config())
    values["model"] |= {"size": "tiny", "depth": 1, "width": 16, "num_heads": 2, "patch_size": 8, "image_size": (16, 16)}
    values["model"] |= {"num_classes": 3, "head": "none", "dtype": "float32", "remat": "none", "inject_after": 1}
    values["optim"] |= {"learning_rate": 1e-3, "ema_decays": (0.9,)}
    values["data"] |= {"path": str(dataset), "batch_size": 8, "num_threads": 2}
    values["checkpoint"] |= {"every_steps": 2, "keep_last": 3}
    values["sample"] |= {"steps": 2, "batch_size": 9}
    values["train"] |= {"steps": 12, "log_every": 1, "sample_every": 0, "watchdog_seconds": 600.0, "bad_steps": 3}
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return from_dict(values)


def flags(devices: int) -> str:
    """XLA's flags of a child: so many CPU devices, and code that is compiled soon rather than well."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


class Child:
    """One training process."""

    def __init__(self, nursery: "Nursery", pid: int, log: pathlib.Path):
        self._nursery, self.pid, self._log = nursery, pid, log

    def wait(self, timeout: float = 900.0) -> int:
        """Its exit code; negative for a signal."""
        return self._nursery.ask({"wait": self.pid, "timeout": timeout})["code"]

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def pause(self, seconds: float) -> None:
        """Lets it live for so long."""
        time.sleep(seconds)

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 900.0) -> None:
        """Waits until something is true, or fails with the child's log."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"timed out; the child said:\n{self.log}"
            time.sleep(0.01)


class Nursery:
    """The process that has imported everything and forks children; use it as a context manager."""

    def __init__(self, scratch: pathlib.Path, *, devices: int = 2):
        self._scratch, self._count = scratch, 0
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags(devices),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("DIP_TEST_CACHE", "/tmp/dip_jax_test_cache") + "_faults",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def ask(self, request: Mapping[str, object]) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        config: Config,
        workdir: pathlib.Path,
        *,
        fault: str = "",
        environment: Mapping[str, str] | None = None,
        **options: object,
    ) -> Child:
        """Starts `train(config, workdir=workdir, **options)`; `fault` names a function of `faults.injections` to run first."""
        request = {"config": to_dict(config), "workdir": str(workdir), "fault": fault, "options": options}
        return self._fork(request, environment or {})

    def call(self, function: str, *arguments: object, count: int = 1, devices: int = 1, fault: str = "") -> list[Child]:
        """Starts `host_jobs.FUNCTION(*arguments)`, which returns an exit code, in `count` processes with `devices` each."""
        request = {"function": f"host_jobs:{function}", "arguments": arguments, "fault": fault}
        common = {"XLA_FLAGS": flags(devices)}
        if count == 1:
            return [self._fork(request, common)]
        common |= membership(count)
        return [self._fork(request, common | {"JAX_PROCESS_ID": str(index)}) for index in range(count)]

    def _fork(self, request: Mapping[str, object], environment: Mapping[str, str]) -> Child:
        self._count += 1
        log = self._scratch / f"child-{self._count}.log"
        log.touch()  # it may be read before the child writes
        pid = self.ask({**request, "log": str(log), "environment": dict(environment)})["pid"]
        return Child(self, pid, log)

    def start_several(
        self,
        count: int,
        config: Config,
        workdir: pathlib.Path,
        *,
        devices: int = 1,
        others: Config | None = None,
        **options: object,
    ) -> list[Child]:
        """Starts a run of `count` processes with `devices` each, process 0 first; `others` is the config of the others."""
        common = membership(count) | {"XLA_FLAGS": flags(devices)}
        children = []
        for index in range(count):
            mine = others if others and index else config
            children.append(self.start(mine, workdir, environment=common | {"JAX_PROCESS_ID": str(index)}, **options))
        return children

    def run(self, config: Config, workdir: pathlib.Path, *, timeout: float = 900.0, **options: object) -> tuple[int, str]:
        """Exit code and log of a whole run."""
        child = self.start(config, workdir, **options)
        return child.wait(timeout), child.log


def membership(count: int) -> dict[str, str]:
    """The environment of a run of `count` processes on a free port, but for the index of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)}


def curve(workdir: pathlib.Path) -> list[dict]:
    """The rows of the metric table, cut to the columns that must repeat exactly."""
    return [{key: row[key] for key in ("step", *EXACT)} for row in writers.read_rows(workdir / "metrics.jsonl")]


def check_curve(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """Asserts that JSONL and CSV have each step once and repeat the reference bit for bit."""
    expected, actual = curve(reference), curve(workdir)
    assert [row["step"] for row in actual] == list(range(1, len(expected) + 1))
    assert actual == expected
    steps = [line.split(",")[0] for line in (workdir / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(row["step"]) for row in actual]


def check_losses(workdir: pathlib.Path, reference: pathlib.Path) -> float:
    """Asserts the steps of the reference and its losses within 1e-5, as other devices allow; returns the worst difference."""
    expected, actual = curve(reference), curve(workdir)
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(actual, expected, strict=True))
    assert worst <= 1e-5, worst
    return worst


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    own = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return own + [each for child in own for each in descendants(child)]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not asked for its exit code does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def steps_of(workdir: pathlib.Path) -> list[int]:
    """Complete steps on disk."""
    root = workdir / "checkpoints"
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.exists() else []


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    """All files of a step directory."""
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip_bit(path: pathlib.Path, rng: random.Random) -> None:
    """Flips one random bit of a file."""
    data = bytearray(path.read_bytes())
    position = rng.randrange(len(data) * 8)
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    """Cuts a file short, at least by one byte."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def delete(path: pathlib.Path, rng: random.Random) -> None:
    """Removes a file."""
    del rng
    path.unlink()


HARMS = {"flip": flip_bit, "truncate": truncate, "delete": delete}


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, *, mebibytes: int) -> Iterator[pathlib.Path]:
    """A file system of its own with little space (needs root)."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
