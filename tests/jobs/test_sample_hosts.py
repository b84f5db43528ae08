"""Real processes: killed while they draw; several that join by `jax.distributed` draw one file, judge, judge in training."""

import json
import pathlib
import signal

import jax
import numpy as np
import pytest
from faults import harness

from dip_jax import config
from dip_jax.checkpoints import checkpoint
from dip_jax.errors import Exit
from dip_jax.models import dip
from dip_jax.runtime import writers

BATCHES, SIZE = 10, 8


@pytest.fixture(scope="module")
def settings(dataset) -> config.Config:
    return harness.tiny_config(dataset, sample__steps=3, sample__batch_size=SIZE, sample__guidance=2.0)


@pytest.fixture(scope="module")
def workdir(settings, tmp_path_factory) -> pathlib.Path:
    """A checkpoint of random weights."""
    key = jax.random.key(1)
    model = dip.from_config(settings.model)
    params = jax.jit(lambda: jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), model.init(key)))()
    folder = tmp_path_factory.mktemp("run")
    checkpoint.write_weights(folder, params, config=settings, step=7)
    return folder


def finish(children: list[harness.Child]) -> str:
    """What they said, once all have ended well."""
    codes = [child.wait(600) for child in children]
    said = "\n".join(child.log for child in children)
    assert codes == [Exit.DONE] * len(children), said
    return said


def sampling(workdir, out) -> list[str]:
    return ["sample", f"--workdir={workdir}", f"--num_samples={BATCHES * SIZE - 3}", f"--out={out}"]


def start_sharded(nursery, workdir, out, fault: str = "") -> harness.Child:
    """One process whose batches are spread over eight devices."""
    return nursery.call("command", *sampling(workdir, out), devices=8, fault=fault)[0]


@pytest.mark.parametrize(
    "points",
    [
        pytest.param([3], id="once"),
        pytest.param(["killed.npz.json", 0, 1, 2, 3, 5, 6, 8, 9, "killed.npz.partial"], id="ten", marks=pytest.mark.slow),
    ],
)
def test_killed_and_given_again_the_file_is_the_same(nursery, workdir, tmp_path, points):
    """SIGKILL at each point: a number of finished batches, or a file that appears. Then the run may end."""
    whole, out = tmp_path / "whole.npz", tmp_path / "killed.npz"
    parts = tmp_path / "killed.npz.parts"
    assert start_sharded(nursery, workdir, whole).wait(600) == Exit.DONE
    stamps: dict[str, int] = {}
    killed = 0
    for point in points:
        child = start_sharded(nursery, workdir, out, "slow_samples")

        def reached(point=point) -> bool:
            here = (tmp_path / point).exists() if isinstance(point, str) else len(list(parts.glob("0*"))) >= point
            return here or out.exists()

        child.wait_for(reached, 600)
        child.send(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        now = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*")} if parts.exists() else {}
        assert stamps.items() <= now.items() or out.exists()  # no finished batch was drawn again; a whole file needs none
        stamps = now
    last = start_sharded(nursery, workdir, out)
    assert last.wait(600) == Exit.DONE, last.log
    assert out.read_bytes() == whole.read_bytes() and not parts.exists()
    assert killed >= 0.9 * len(points)  # joining the parts may be over before the kill arrives
    print(f"{killed} kills: the file is that of an undisturbed run")


@pytest.mark.slow
def test_any_number_of_hosts_gives_the_same_file_also_after_kills(nursery, workdir, tmp_path):
    """Two hosts are killed, one goes on and is killed, three finish: the bytes are those of one undisturbed host."""
    alone, shared = tmp_path / "alone.npz", tmp_path / "shared.npz"
    finish(nursery.call("command", *sampling(workdir, alone)))
    parts = tmp_path / "shared.npz.parts"
    stamps: dict[str, int] = {}
    killed = 0
    for hosts, point in ((2, 3), (1, 6)):
        children = nursery.call("command", *sampling(workdir, shared), count=hosts, fault="slow_samples")
        children[0].wait_for(lambda n=point: shared.exists() or (parts.exists() and len(list(parts.glob("0*"))) >= n), 600)
        for child in children:
            child.send(signal.SIGKILL)
        killed += [child.wait() for child in children].count(-signal.SIGKILL)
        now = {part.name: part.stat().st_mtime_ns for part in parts.glob("0*")}
        assert stamps.items() <= now.items()  # no finished batch was drawn again
        stamps = now
    assert killed == 3 and 0 < len(stamps) < BATCHES
    said = finish(nursery.call("command", *sampling(workdir, shared), count=3))
    assert said.count("drawing ") == 1  # one host speaks
    assert shared.read_bytes() == alone.read_bytes() and not parts.exists()


@pytest.mark.slow
def test_a_mistake_on_one_host_ends_all(nursery, workdir, tmp_path):
    children = nursery.call("command", *sampling(workdir, "/proc/nothing/here.npz"), count=2)
    assert [child.wait(300) for child in children] == [Exit.USER_ERROR] * 2, children[0].log + children[1].log
    assert "cannot be written" in children[0].log and "process 0 stopped with an error" in children[1].log
    children = nursery.call("command_failing_on_host_1", *sampling(workdir, tmp_path / "out.npz"), count=2)
    assert [child.wait(300) for child in children] == [Exit.USER_ERROR] * 2, children[0].log + children[1].log
    assert "another process stopped with an error" in children[0].log and "no room on host 1" in children[1].log


@pytest.mark.slow
@pytest.mark.parametrize("out", ["out.npz", "pictures"])
def test_outputs_that_are_not_one_place_end_both_before_an_image(nursery, workdir, tmp_path, out):
    children = nursery.call("command_on_own_disk", str(tmp_path), *sampling(workdir, out), count=2)
    assert [child.wait(300) for child in children] == [Exit.USER_ERROR] * 2, children[0].log + children[1].log
    assert all("is not one place: processes [1] do not see what process 0 writes there" in child.log for child in children)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left in (["out.npz.json"], ["settings.json"])


@pytest.mark.slow
def test_two_hosts_judge_as_one_does(nursery, workdir, settings, tmp_path):
    found = {}
    for hosts in (1, 2):
        out = tmp_path / f"{hosts}.json"
        flags = [f"--reference={settings.data.path}", "--num_samples=40", f"--out={out}", f"--cache={tmp_path / 'cache'}"]
        said = finish(nursery.call("command", "evaluate", f"--workdir={workdir}", *flags, count=hosts))
        assert said.count("averaged weights (EMA)  ") == 1  # one host writes the table
        found[hosts] = json.loads(out.read_text())["rows"][-1]
        assert found[hosts].pop("row") == "averaged weights (EMA)"
    assert found[1].keys() == found[2].keys() and "fid_toy" in found[1]
    for name, value in found[1].items():
        assert found[2][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.slow
def test_hosts_meet_after_judging_while_they_train(nursery, settings, tmp_path):
    """Judging takes longer than the watchdog waits for a step, on one host; the other is still there afterwards."""
    values = config.to_dict(settings)
    values["eval"] |= {"reference": settings.data.path, "num_samples": 6, "batch_size": 8}
    values["train"] |= {"steps": 5, "eval_every": 2, "watchdog_seconds": 20.0}
    finish(nursery.call("train_judged", values, str(tmp_path / "run"), 4.0, count=2))  # 28 s at the first mark
    rows = writers.read_rows(tmp_path / "run" / "eval.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all(np.isfinite([row["fid_toy"], row["raw_fid_toy"]]).all() and row["N"] == 6 for row in rows)
