"""`launch/tpu_pod.sh` against a stand-in for gcloud whose workers are local processes: the whole life of a slice."""

import re
import shutil
import subprocess

import launching
import pytest

NAME = launching.SLICE


@pytest.fixture
def pod(tmp_path):
    """Two workers on which steps are slow."""
    with launching.Pod(tmp_path, python=launching.write_slow_python(tmp_path)) as pod:
        yield pod


def calls(pod) -> list[str]:
    """The gcloud calls so far but for looks at the state, in two words each."""
    return [" ".join(words[2:4]) for words in pod.calls() if "describe" not in words]


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


@pytest.mark.parametrize("last", [False, True], ids=["before COMMAND", "after it"])
def test_dry_run_calls_nothing(pod, last):
    flags, command = ["--spot", "--project=p"], ["train", "--config=a b.py"]
    (command if last else flags).append("--dry-run")
    before = set(pod.shim.rglob("*"))
    done = pod("up", *NAME, *flags, *command, TMPDIR=str(pod.shim))
    assert done.returncode == 0 and set(pod.shim.rglob("*")) == before
    show = f'gcloud() {{ printf "%s\\0" "$@"; printf "\\1"; }}; git() {{ :; }}; tar() {{ :; }}\n{done.stdout}'
    said = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True).stdout
    lines = [call.split("\0")[:-1] for call in said.split("\1")[:-1]]
    assert [words[2:4] for words in lines] == [["queued-resources", "create"], ["tpu-vm", "scp"], *[["tpu-vm", "ssh"]] * 3]
    assert "--spot" in lines[0] and "--project=p" in lines[0]
    (start,) = (word for word in lines[-1] if word.startswith("--command="))
    (line,) = re.findall("^--command=line=(.*) start=.*$", start, re.MULTILINE)
    command = subprocess.run(["bash", "-c", f"line={line}; eval printf '%s,' $line"], capture_output=True, text=True)
    assert "# JAX_" in done.stdout and "HOME/dip_jax/.venv/bin/python -m dip_jax train --config=a\\ b.py" in done.stdout
    assert command.stdout == "bash,launch/local.sh,--accelerator=cpu,train,--config=a b.py,"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "which action?"),
        (["upp"], "which action?"),
        (["create", "--zone=z"], "--name is missing"),
        (["create", "--name=n"], "--zone is missing"),
        (["run", "--name=n", "--zone=z"], "needs a COMMAND"),
        (["create", "--name=n", "--zome=z"], "--zome"),
        (["create", "--name=n", "--zone=z", "--poll=08"], "--poll=08"),
        (["create", "--name=n", "--zone=z", "--poll=soon"], "--poll=soon"),
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
