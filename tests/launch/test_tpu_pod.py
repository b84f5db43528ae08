"""`launch/tpu_pod.sh` against a stand-in for gcloud whose workers are local processes: the whole life of a slice."""

import json
import shlex
import shutil
import sys

import launching
import pytest
from places import SUPPORT

NAME = ("--name=dip", "--zone=here", "--poll=0", "--accelerator=cpu")


@pytest.fixture
def pod(tmp_path):
    """Calls the launcher with two workers; returns the finished process."""
    shim = tmp_path / "shim"
    (shim / "bin").mkdir(parents=True)
    gcloud = shim / "bin" / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nexec {sys.executable} {SUPPORT / "gcloud_shim.py"} "$@"\n')
    gcloud.chmod(0o755)
    slow = launching.write_slow_python(tmp_path)
    path = launching.environment()["PATH"]

    def call(*argv: object):
        return launching.launch(
            "launch/tpu_pod.sh",
            *argv,
            PATH=f"{shim / 'bin'}:{path}",
            SHIM=str(shim),
            SHIM_WORKERS="2",
            PYTHON=str(slow),
            JAX_COORDINATOR_ADDRESS=launching.free_address(),
            JAX_NUM_PROCESSES="2",
        )

    call.shim = shim
    return call


def calls(pod) -> list[str]:
    """The gcloud calls so far but for looks at the state, in two words each."""
    lines = map(json.loads, (pod.shim / "calls").read_text().splitlines())
    return [" ".join(words[2:4]) for words in lines if "describe" not in words]


@pytest.mark.slow
def test_a_preempted_run_gets_another_slice_and_goes_on(pod, tmp_path):
    config = launching.write_config(tmp_path, steps=20)
    (pod.shim / "preempt").write_text(str(tmp_path / "run"))
    done = pod("up", *NAME, "--spot", "train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preempted" in done.stderr
    life = ["queued-resources create", "tpu-vm scp", *["tpu-vm ssh"] * 3]
    assert calls(pod) == [*life, "tpu-vm ssh", "queued-resources delete", *life]
    assert list(launching.losses(tmp_path / "run")) == list(range(1, 21))
    assert "going on from step" in done.stdout
    for worker in "01":
        assert (pod.shim / "workers" / worker / "dip_jax" / "logs" / "exit").read_text().strip() == "0"
    assert pod("status", *NAME).stdout.strip() == "ACTIVE"
    assert pod("delete", *NAME).returncode == 0
    assert pod("status", *NAME).stdout.strip() == "NONE"


def test_a_mistake_is_not_repeated(pod):
    done = pod("up", *NAME, "train", "--config=nowhere.py", "--workdir=x")
    assert done.returncode == 2, done.stderr
    assert "nowhere.py: no such file" in done.stdout and "not repeated" in done.stderr
    assert calls(pod).count("queued-resources create") == 1


def test_dry_run_calls_nothing(pod):
    done = pod("up", *NAME, "--dry-run", "--spot", "--project=p", "train", "--config=a b.py")
    assert done.returncode == 0 and not (pod.shim / "calls").exists()
    lines = [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]
    assert [words[3:5] for words in lines if words[:3] == ["gcloud", "compute", "tpus"]] == [
        ["queued-resources", "create"],
        ["tpu-vm", "scp"],
        *[["tpu-vm", "ssh"]] * 3,
    ]
    assert "--spot" in lines[0] and "--project=p" in lines[0]
    assert r"--config=a\\ b.py" in lines[-1][-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "which action?"),
        (["upp"], "which action?"),
        (["create", "--zone=z"], "--name is missing"),
        (["create", "--name=n"], "--zone is missing"),
        (["run", "--name=n", "--zone=z"], "needs a COMMAND"),
        (["create", "--name=n", "--zome=z"], "--zome"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(argv, words):
    done = launching.launch("launch/tpu_pod.sh", *argv)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_without_gcloud_it_says_so(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = launching.launch("launch/tpu_pod.sh", "status", *NAME, PATH=str(tmp_path))
    assert done.returncode == 2 and "gcloud is not on PATH" in done.stderr
