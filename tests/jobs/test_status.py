"""What `status` says of a run: by hand, on a run that goes on, on a bucket, and without a device."""

import json
import subprocess
import sys

import pytest
from etils import epath
from faults import harness
from places import ROOT

from dip_jax.jobs import status, train
from dip_jax.runtime import goodput, writers

SCRIPT = """
import sys
from dip_jax import __main__
code = __main__.main(["status", *sys.argv[1:]])
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def workdir(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("status") / "run"
    train.train(harness.tiny_config(dataset, train__steps=4), workdir=folder)
    return folder


def ask(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


def test_a_finished_run_without_touching_a_device(workdir):
    done = ask(f"--workdir={workdir}", "--json", "--verify")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["state"], facts["step"], facts["steps"]) == ("finished", 4, 4)
    last = writers.read_rows(workdir / "metrics.jsonl")[-1]
    assert facts["last"]["loss"] == last["loss"] and (facts["last"]["skipped"], facts["last"]["replaced"]) == (0, 0)
    assert [row["checkpoint"] for row in facts["checkpoints"]] == ["2", "4"]
    for row in facts["checkpoints"]:
        assert row["hashes"] == "as it was written"
        files = harness.files_of(workdir / "checkpoints" / row["checkpoint"])
        assert row["bytes"] == sum(path.stat().st_size for path in files)
    (start,) = facts["starts"]
    assert (start["from step"], start["to step"], start["exit"]) == (0, 4, "0")
    assert sum(facts["seconds"].values()) == pytest.approx(start["seconds"], abs=0.06)
    assert facts["seconds"]["compiling"] > 0 and facts["seconds"]["steps"] > 0 and facts["seconds"]["saving"] > 0
    assert sum(last[key] for key in last if key == "goodput" or key.startswith("lost_")) == pytest.approx(1)
    text = ask(f"--workdir={workdir}").stdout
    assert "productive steps" in text and "4 of 4" in text and "manifest there" in text


def test_no_run_is_one_line(tmp_path):
    done = ask(f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no workdir of a run" in done.stderr
    assert ask().returncode == 2


def test_damage_a_kill_and_a_run_that_goes_on(workdir, tmp_path):
    folder = epath.Path(tmp_path / "run")
    subprocess.run(["cp", "-r", str(workdir), str(folder)], check=True)
    file = max(harness.files_of(tmp_path / "run" / "checkpoints" / "2" / "ema"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"x" + file.read_bytes()[1:])
    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "aside")
    (folder / "checkpoints" / "damaged" / "4").mkdir(parents=True)
    (folder / "goodput.json").write_text(
        json.dumps(
            {
                "starts": [
                    {"began": 100.0, "last": 110.0, "origin": 0, "step": 4, "seconds": {"steps": 6.0, "start_up": 4.0}},
                    {"began": 130.0, "last": 140.0, "origin": 2, "step": 3, "seconds": {"again": 10.0}},
                ]
            }
        )
    )
    facts = status.describe(folder, verify=True, now=141.0)
    assert facts["state"] == "going on" and facts["damaged"] == ["4"]
    assert [row["exit"] for row in facts["starts"]] == ["killed", "runs"]
    assert facts["checkpoints"][0]["hashes"].startswith("damaged: ema/")
    assert (facts["seconds"]["stopped"], facts["seconds"]["again"], facts["seconds"]["steps"]) == (20, 10, 6)
    assert status.describe(folder, now=200.0)["state"] == "killed, or its host is gone"
    (folder / "goodput.json").unlink()
    assert status.describe(folder)["state"].startswith("unknown")
    assert "going on" not in "\n".join(status._tell(status.describe(folder)))


def test_a_checkpoint_that_goes_while_it_is_read_is_left_out(tmp_path):
    assert status._describe_step(epath.Path(tmp_path / "7"), verify=True) is None


def test_a_ledger_of_a_bucket_says_going_on_for_longer():
    start = goodput.Start(0.0, 100.0, 0, 1, {"steps": 100.0})
    assert start.runs(350.0, local=False) and not start.runs(350.0, local=True)
