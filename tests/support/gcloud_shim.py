"""Stands in for `gcloud compute tpus`: a slice is a folder, a worker a home directory in it, ssh a local process.

SHIM (a folder) holds `calls` (a line per call), `state`, and `workers/I`. Where SHIM/preempt names a workdir, the slice is
taken away a few steps after its first checkpoint: workers are killed, homes are gone, the state is SUSPENDED. Where SHIM/cut is
there, the connection to a command that has started on every worker breaks; the next one writes SHIM/go.

SHIM/faults (JSON) lists failures: {"call": its first two words, "error": what gcloud says, "times": how often} or, instead
of times, "seconds": until `sleep` was told to wait so long (SHIM/slept). With "started": once a command has; "code": not 1.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from leftovers import kill_at_home

SHIM = pathlib.Path(os.environ["SHIM"])
COUNT = int(os.environ["SHIM_WORKERS"])
STATE = SHIM / "state"
PREEMPT = SHIM / "preempt"
NEW = SHIM / "state_of_new_requests"
CUT = SHIM / "cut"
FAULTS = SHIM / "faults"


def main(argv: list[str]) -> int:
    with open(SHIM / "calls", "a") as calls:
        calls.write(json.dumps(argv) + "\n")
    assert argv[:2] == ["compute", "tpus"], argv
    flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))
    words = [word for word in argv[2:] if not word.startswith("--")]
    assert "zone" in flags, argv
    rule = fault(" ".join(words[:2]))
    if rule is not None:
        print(rule["error"], file=sys.stderr)
        return rule.get("code", 1)
    if words[:2] == ["queued-resources", "create"]:
        assert not STATE.exists(), "a request of that name exists"
        assert flags["node-id"] == words[2] and "accelerator-type" in flags and "runtime-version" in flags
        STATE.write_text(NEW.read_text() if NEW.exists() else "WAITING_FOR_RESOURCES")
    elif words[:2] == ["queued-resources", "describe"]:
        return describe()
    elif words[:2] == ["queued-resources", "delete"]:
        assert "force" in flags and "quiet" in flags
        STATE.unlink()
        shutil.rmtree(SHIM / "workers", ignore_errors=True)
    elif words[:2] == ["tpu-vm", "scp"]:
        for home in homes(flags["worker"]):
            shutil.copy(words[2], home / words[3].partition(":")[2])
    elif words[:2] == ["tpu-vm", "ssh"]:
        return ssh(flags["worker"], flags["command"])
    else:
        raise AssertionError(argv)
    return 0


def fault(call: str) -> dict | None:
    """The failure that is due instead of this call."""
    rules = json.loads(FAULTS.read_text()) if FAULTS.exists() else []
    for rule in rules:
        if rule["call"] != call or (rule.get("started") and not starts()):
            continue
        if "seconds" in rule:
            slept = SHIM / "slept"
            if slept.exists() and sum(map(int, slept.read_text().split())) >= rule["seconds"]:
                continue
        elif rule["times"] == 0:
            continue
        else:
            rule["times"] -= 1
            FAULTS.write_text(json.dumps(rules))
        return rule
    return None


def starts() -> int:
    """How often a command has been started on a worker; the tests' commands write it down."""
    return sum(len(path.read_text().split()) for path in SHIM.glob("starts.*"))


def describe() -> int:
    """Prints the state; a request that waits is granted at the second look. The error is what gcloud 528 says."""
    if not STATE.exists():
        where = f"projects/p/locations/here/queuedResources/{sys.argv[5]}"
        print(
            f"ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource '{where}' was not found.",
            file=sys.stderr,
        )
        return 1
    state = STATE.read_text()
    print(state)
    if state == "WAITING_FOR_RESOURCES":
        for i in range(COUNT):
            (SHIM / f"workers/{i}").mkdir(parents=True)
        STATE.write_text("ACTIVE")
    return 0


def homes(worker: str) -> list[pathlib.Path]:
    return [SHIM / f"workers/{i}" for i in (range(COUNT) if worker == "all" else [int(worker)])]


def ssh(worker: str, command: str) -> int:
    """The command in every home at once; the largest exit code."""
    if not STATE.exists() or STATE.read_text() != "ACTIVE":
        return 255
    if worker == "all" and (SHIM / "was_cut").exists():
        (SHIM / "go").touch()
    running = []
    for home in homes(worker):
        env = os.environ | {"HOME": str(home), "JAX_PROCESS_ID": home.name}
        running.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=env, start_new_session=True))
    while any(process.poll() is None for process in running):
        if PREEMPT.exists() and in_full_swing(pathlib.Path(PREEMPT.read_text())):
            PREEMPT.unlink()
            STATE.write_text("SUSPENDED")
            kill_at_home(SHIM / "workers")
            shutil.rmtree(SHIM / "workers", ignore_errors=True)
            return 255
        if CUT.exists() and starts() == COUNT:
            CUT.rename(SHIM / "was_cut")
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
            return 255
        time.sleep(0.02)
    return max(process.wait() for process in running)


def in_full_swing(workdir: pathlib.Path) -> bool:
    """True some steps after a complete checkpoint."""
    steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return bool(steps) and len((workdir / "metrics.jsonl").read_text().splitlines()) > max(steps) + 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
