"""A tool that fails is no answer: nvidia-smi, SLURM, uv and Python each fail in turn, and the launchers say so or ask again."""

import os
import pathlib
import shutil
import subprocess

import pytest
from places import ROOT

# All that install.sh needs but a Python, uv and nvidia-smi.
TOOLS = ("bash", "cat", "cksum", "dirname", "env", "grep", "paste", "sed", "sort", "touch", "mkdir", "chmod")
MISMATCH = "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
NO_DRIVER = "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9"
PYTHON = "[ $1 != -c ] || echo 3.12"


class Checkout:
    """The launchers in a folder of their own, and a PATH of the tools that a test gives beside the most common ones."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.bin = folder / "checkout", folder / "bin"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def tool(self, name: str, script: str) -> pathlib.Path:
        file = self.bin / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)
        return file

    def bash(self, *argv: str, path: str = "", **env: str) -> subprocess.CompletedProcess:
        env |= {"PATH": f"{self.bin}{path}", "HOME": str(self.root), "SAID": str(self.root / "said")}
        return subprocess.run(["bash", *argv], cwd=self.root, env=env, capture_output=True, text=True, timeout=60)

    def said(self) -> list[str]:
        """What the tools wrote down."""
        file = self.root / "said"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def one_line(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo 'GPU 0: a card'", "cuda"),
        ("exit 0", "cpu"),
        ("echo 'No devices were found'; exit 6", "cpu"),
        (NO_DRIVER, "cpu"),  # and no card on this machine's bus
        (MISMATCH, None),
        ("exit 255", None),
        ("kill -9 $$", None),
    ],
)
@pytest.mark.skipif(
    any(map(os.path.exists, ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0"))), reason="there is an accelerator here"
)
def test_what_nvidia_smi_says_and_what_it_cannot(checkout, script, answer):
    checkout.tool("nvidia-smi", script)
    done = checkout.bash("launch/accelerator.sh")
    if answer is None:
        one_line(done, 2, "nvidia-smi ends with", "--accelerator=cpu")
        shown = checkout.bash("-uc", "source launch/env.sh auto; echo $JAX_PLATFORMS")
        assert shown.returncode == 2 and shown.stdout == ""
    else:
        assert (done.returncode, done.stdout) == (0, answer + "\n")


def test_a_card_without_its_driver_is_no_cpu_machine(checkout):
    """The bus of this machine has no such card: `grep` finds one."""
    checkout.tool("nvidia-smi", NO_DRIVER)
    (checkout.bin / "grep").unlink()
    checkout.tool("grep", f'case "$*" in *0x10de*) exit 0 ;; *) exec {shutil.which("grep")} "$@" ;; esac')
    one_line(checkout.bash("launch/accelerator.sh"), 2, "ends with 9", "could not communicate", "mend the driver")


@pytest.mark.parametrize(
    "argv", [["install.sh"], ["install.sh", "--accelerator=cuda"], ["demo.sh"], ["local.sh", "info"]], ids=" ".join
)
def test_a_broken_driver_ends_every_launcher(checkout, argv):
    checkout.tool("nvidia-smi", MISMATCH)
    for tool in ("realpath", "python3.12"):
        checkout.tool(tool, PYTHON)
    one_line(checkout.bash(f"launch/{argv[0]}", *argv[1:]), 2, "version mismatch")
    assert not (checkout.root / ".venv").exists()


def test_gpus_that_cannot_be_counted(checkout):
    checkout.tool("nvidia-smi", MISMATCH)
    argv = ["launch/local.sh", "--processes=2", "--accelerator=cuda", "info"]
    one_line(checkout.bash(*argv, PYTHON="python"), 2, "local.sh: nvidia-smi cannot count the GPUs", "version mismatch")
    checkout.tool("nvidia-smi", "exit 0")
    one_line(checkout.bash(*argv, PYTHON="python"), 2, "this machine has 0 GPUs")


def test_a_tpu_is_not_asked_of_nvidia_smi(checkout):
    checkout.tool("nvidia-smi", MISMATCH)
    assert "nvidia" not in checkout.bash("launch/install.sh", "--accelerator=tpu").stderr


def test_a_python_that_does_not_start_is_passed_over_and_named(checkout):
    checkout.tool("python3.12", "exit 127")
    checkout.tool("python3", "echo 3.10")
    one_line(checkout.bash("launch/install.sh", "--accelerator=cpu"), 2, "python3.12 (does not start), python3 (3.10)")
    checkout.tool("python3.11", "echo 3.11")
    checkout.tool("uv", 'echo "$@" >>$SAID')
    checkout.bash("launch/install.sh", "--accelerator=cpu")
    assert checkout.said()[0].startswith("venv --quiet --python python3.11 ")


def test_an_environment_whose_python_is_broken(checkout):
    """As after an update of the system: the file is there and the stamp says that all is installed."""
    checkout.tool("python3.12", PYTHON)
    checkout.tool("uv", "[ $1 = pip ] || { mkdir -p $5/bin; echo '#!/bin/sh' >$5/bin/python; chmod +x $5/bin/python; }")
    assert checkout.bash("launch/install.sh", "--accelerator=cpu").returncode == 0
    assert checkout.bash("launch/install.sh", "--accelerator=cpu").stderr == ""  # all is there
    (checkout.root / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 127\n")
    one_line(checkout.bash("launch/install.sh", "--accelerator=cpu"), 2, ".venv does not start", "remove that folder")


def test_an_installation_that_fails_is_no_mistake(checkout):
    """uv ends with 2 where the network fails, which schedulers would take for a mistake of the user's."""
    checkout.tool("python3.12", PYTHON)
    checkout.tool("uv", "echo no network >&2; exit 2")
    for argv in (["launch/install.sh"], ["launch/local.sh", "info"], ["launch/slurm.sbatch", "train"]):
        done = checkout.bash(*argv, ACCELERATOR="cpu", SLURM_JOB_ID="7", path=":/usr/bin:/bin" if "slurm" in argv[0] else "")
        assert done.returncode == 1 and done.stderr.splitlines()[-2:] == [
            "no network",
            "install.sh: the installation failed, see above; run it again",
        ]


class Job(Checkout):
    """`slurm.sbatch` as SLURM starts it, on two nodes, with stand-ins for srun and scontrol; pauses are written down."""

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.tool("sleep", 'echo "sleep $1" >>$SAID')
        self.tool("srun", 'echo "srun at $JAX_COORDINATOR_ADDRESS" >>$SAID; exit ${CODE:-0}')
        self.scontrol("")

    def scontrol(self, first: str, *, address: str = "NodeAddr=10.0.0.1") -> None:
        names = f'case "$2" in hostnames) printf "n1\\nn2\\n" ;; node) echo "NodeName=$3 {address} State=IDLE" ;; esac'
        self.tool("scontrol", f'echo "scontrol $*" >>$SAID\n{first}\n{names}')

    def __call__(self, **env: str) -> subprocess.CompletedProcess:
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "ACCELERATOR": "cpu",
            "PYTHON": "python",
        }
        return self.bash("launch/slurm.sbatch", "train", path=":/usr/bin:/bin", **job, **env)


# Fails so often for calls with this word, of which it keeps the number in a file.
FAILS = 'if [[ "$*" == *{word}* ]]; then echo x >>$SAID.{word}; [ "$(wc -l <$SAID.{word})" -gt {times} ] || exit 1; fi'


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize("word", ["hostnames", "node"])
def test_slurm_is_asked_again_for_the_first_node(job, word):
    job.scontrol(FAILS.format(word=word, times=2))
    done = job()
    assert done.returncode == 0, done.stderr
    assert [line for line in job.said() if not line.startswith("scontrol")] == [
        "sleep 30",
        "sleep 60",
        "srun at 10.0.0.1:20007",
    ]


def test_without_the_first_node_nothing_is_started(job):
    job.scontrol(FAILS.format(word="node", times=99))
    done = job(POLL="7")
    assert done.returncode == 1 and "scontrol show node n1 failed" in done.stderr.splitlines()[-1]
    assert [line for line in job.said() if not line.startswith("scontrol")] == [f"sleep {7 * 2**i}" for i in range(5)]


def test_a_node_without_an_address_is_called_by_its_name(job):
    job.scontrol("", address="")
    assert job().returncode == 0 and "srun at n1:20007" in job.said()


def test_requeueing_is_tried_again(job):
    job.scontrol(FAILS.format(word="requeue", times=3))
    assert job(CODE="85").returncode == 0
    assert job.said().count("scontrol requeue 7") == 4 and job.said()[-2] == "sleep 120"


def test_a_job_that_cannot_be_requeued_ends_with_its_own_code(job):
    job.scontrol(FAILS.format(word="requeue", times=99))
    done = job(CODE="85")
    assert done.returncode == 85 and "scontrol requeue 7 failed" in done.stderr.splitlines()[-1]


def test_crashes_that_cannot_be_counted_are_not_requeued(job):
    (job.root / "logs" / "slurm-7.crashes").mkdir(parents=True)
    done = job(CODE="1")
    assert done.returncode == 1 and "cannot be written" in done.stdout
    assert "scontrol requeue 7" not in job.said()


def test_crashes_are_counted(job):
    assert [job(CODE="1").returncode for _ in range(4)] == [0, 0, 0, 1]
    assert job.said().count("scontrol requeue 7") == 3
