"""Real processes over loopback: every topology the same run; one life of a run over changing process counts; mistakes.

CI runs a reduced set (`--slow`). All topologies: `bash launch/test.sh --slow --campaign -s tests/runtime/test_hosts.py`.
"""

import dataclasses
import json
import pathlib
import time

import pytest
from faults import harness

from dip_jax import config
from dip_jax.errors import Exit

STEPS = 20
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
TOPOLOGIES = {"1x8": (1, 8), "2x4": (2, 4), "4x2": (4, 2)}
REDUCED = {("mixed", "1x8"), ("mixed", "2x4"), ("fsdp", "4x2")}


def settings(dataset: pathlib.Path, mesh: tuple[int, int, int]) -> config.Config:
    """Eight heads, so that a tensor axis of eight divides them; steps large enough for the loss to hang on the network."""
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    sizes |= {"model__width": 32, "model__num_heads": 8, "optim__learning_rate": 1e-2}
    return harness.tiny_config(dataset, train__steps=STEPS, checkpoint__every_steps=100, **sizes)


def losses(workdir: pathlib.Path) -> list[float]:
    rows = harness.curve(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def finish(children: list[harness.Child], code: int = Exit.DONE) -> str:
    codes = [child.wait(900) for child in children]
    said = "\n".join(child.log for child in children)
    assert codes == [code] * len(children), said
    return said


@pytest.fixture(scope="module")
def alone(nursery, dataset, tmp_path_factory) -> list[dict]:
    """The curve of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(nursery.start_several(1, settings(dataset, (1, 1, 1)), workdir))
    assert len(losses(workdir)) == STEPS
    return harness.curve(workdir)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.slow
def test_every_topology_is_the_same_run(request, nursery, dataset, alone, tmp_path, mesh, topology):
    if (mesh, topology) not in REDUCED and not request.config.getoption("--campaign"):
        pytest.skip("needs --campaign")
    count, devices = TOPOLOGIES[topology]
    finish(nursery.start_several(count, settings(dataset, MESHES[mesh]), tmp_path / "run", devices=devices))
    curve = harness.curve(tmp_path / "run")
    worst, gradients = (
        max(abs(a[key] / b[key] - 1) for a, b in zip(curve, alone, strict=True)) for key in ("loss", "grad_norm")
    )
    start = abs(curve[0]["param_norm"] / alone[0]["param_norm"] - 1)
    print(f"{mesh} {topology}: {STEPS} losses within {worst:.1e}, gradient norms {gradients:.1e}, first parameters {start:.1e}")
    assert worst <= 1e-5 and gradients <= 2e-4 and start <= 1e-6


@pytest.mark.slow
def test_train_resume_sample_evaluate_with_changing_process_counts(nursery, dataset, tmp_path):
    """2 processes train, 4 go on, 2 sample, 4 judge; the curve is that of one process."""
    workdir, samples, metrics = tmp_path / "run", tmp_path / "samples.npz", tmp_path / "metrics.json"
    half, whole = (harness.tiny_config(dataset, train__steps=steps) for steps in (6, 12))
    finish(nursery.start_several(2, half, workdir))
    assert "going on from step 6" in finish(nursery.start_several(4, whole, workdir))
    finish(nursery.start_several(1, whole, tmp_path / "alone"))
    assert losses(workdir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    finish(nursery.call("command", "sample", f"--workdir={workdir}", "--num_samples=30", f"--out={samples}", count=2))
    judged = ("evaluate", f"--samples={samples}", f"--reference={dataset}", "--features=lite0", f"--out={metrics}")
    finish(nursery.call("command", *judged, count=4))
    (row,) = json.loads(metrics.read_text())["rows"]
    assert row["N"] == 30 and any(name.startswith("fid_") for name in row)


def ended(children: list[harness.Child], words: str) -> None:
    """All end within 90 s, none well; the words are said in a line by all, or by the first."""
    begin = time.monotonic()
    codes = [child.wait(90) for child in children]
    print(f"{words}: {codes} after {time.monotonic() - begin:.0f} s")
    assert all(code not in (Exit.DONE, -99) for code in codes), codes
    assert words in children[0].log, children[0].log
    assert not any("Traceback" in child.log for child in children), "\n".join(child.log for child in children)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "others", "words"),
    [
        ({"data__batch_size": 9}, {}, "data.batch_size=9 is not divisible by the 2 parts"),
        ({"mesh__data": 4}, {}, "needs 4 devices but there are 2"),
        (
            {"mesh__tensor": 2, "mesh__data": 1, "model__width": 12, "model__num_heads": 3},
            {},
            "does not divide model.num_heads=3",
        ),
        ({}, {"optim__learning_rate": 0.5}, "config.optim.learning_rate: 0.001 in process 0, 0.5 in process 1"),
        ({"data__path": "/nowhere"}, {}, "/nowhere"),
    ],
    ids=["batch", "mesh", "heads", "configs", "data"],
)
def test_a_mistake_ends_all_hosts(nursery, dataset, tmp_path, changes, others, words):
    mine = harness.tiny_config(dataset, **changes)
    theirs = harness.tiny_config(dataset, **{**changes, **others}) if others else None
    ended(nursery.start_several(2, mine, tmp_path / "run", others=theirs), words)


@pytest.mark.slow
def test_data_that_one_host_lacks_ends_all(nursery, dataset, tmp_path):
    """The config is the same; the second host's folder is gone, as on a disk that was not mounted there."""
    pair = nursery.start_several(2, harness.tiny_config(dataset), tmp_path / "run", fault="no_data_on_host_1")
    ended(pair, "another process stopped")
    assert "no such dataset here" in pair[1].log


@pytest.mark.slow
def test_two_hosts_read_a_checkpoint_once_between_them(nursery, dataset, tmp_path):
    """Each a half of what both hold; the arrays are those that each would have read for itself."""
    run = harness.tiny_config(dataset, train__steps=2, model__width=256)
    finish(nursery.start_several(2, run, tmp_path / "run", devices=2))
    stored = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "2").rglob("*/d/*"))
    found = {}
    for once in (True, False):
        values = config.to_dict(dataclasses.replace(run, checkpoint=dataclasses.replace(run.checkpoint, read_once=once)))
        pair = nursery.call("restore", values, str(tmp_path / "run"), count=2, devices=2)
        finish(pair)
        lines = [next(line for line in child.log.splitlines() if line.startswith("{")) for child in pair]
        found[once] = [json.loads(line) for line in lines]
        print(f"read_once={once}: {[row['bytes'] for row in found[once]]} of {stored} bytes")
    assert len({row["digest"] for rows in found.values() for row in rows}) == 1
    assert all(row["bytes"] > 0.9 * stored for row in found[False])
    assert all(row["bytes"] < 0.6 * stored for row in found[True])


@pytest.mark.slow
def test_workdirs_that_are_not_one_place_end_both_at_once_and_leave_nothing(nursery, dataset, tmp_path):
    """As where every host has a disk of its own under the same name."""
    mine, common = harness.tiny_config(dataset), harness.membership(2) | {"XLA_FLAGS": harness.flags(1)}
    begin = time.monotonic()
    places = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    pair = [nursery.start(mine, place, environment=common | {"JAX_PROCESS_ID": str(i)}) for i, place in enumerate(places)]
    assert [child.wait(90) for child in pair] == [Exit.USER_ERROR] * 2, pair[0].log + pair[1].log
    print(f"both ended after {time.monotonic() - begin:.0f} s")
    assert time.monotonic() - begin < 60
    for child, place in zip(pair, places, strict=True):
        assert f"--workdir={place} is not one place: processes [1] do not see what process 0 writes there" in child.log
        assert "Traceback" not in child.log
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not any(place.exists() for place in places)


@pytest.mark.campaign
def test_a_host_150_s_late_needs_the_flag(nursery, dataset, tmp_path):
    mine = harness.tiny_config(dataset, train__steps=2)
    for name, patience, code in (("raised", {"JAX_JOIN_SECONDS": "300"}, Exit.DONE), ("usual", {}, Exit.CRASH)):
        common = harness.membership(2) | {"XLA_FLAGS": harness.flags(1)} | patience
        first = nursery.start(mine, tmp_path / name, environment=common | {"JAX_PROCESS_ID": "0"})
        first.pause(150)
        second = nursery.start(mine, tmp_path / name, environment=common | {"JAX_PROCESS_ID": "1"})
        codes = [child.wait(300) for child in (first, second)]
        print(f"{name}: {codes}\n{first.log}{second.log}")
        assert codes == [code] * 2
    for child, index in ((first, 0), (second, 1)):
        (line,) = [line for line in child.log.splitlines() if line.startswith("dip_jax: ")]
        assert f"process {index} of 2 waited 60 s for the others" in line and "--join_seconds=180 waits longer" in line


@pytest.mark.slow
def test_a_second_launch_into_a_workdir_is_refused(nursery, dataset, tmp_path):
    mine = harness.tiny_config(dataset, train__steps=100_000)
    first = nursery.start_several(2, mine, tmp_path / "run", fault="slow_steps")
    try:
        first[0].wait_for(lambda: len(harness.curve(tmp_path / "run")) >= 2, 600)
        ended(nursery.start_several(2, mine, tmp_path / "run"), "is in use by process")
    finally:
        for child in first:
            child.send(9)
            child.wait()


@pytest.mark.slow
def test_a_run_that_does_not_come_together_ends_in_one_line(nursery, dataset, tmp_path):
    """Process 1 with an address where nobody is; process 0 whose partner never comes."""
    mine = harness.tiny_config(dataset)
    lost = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    waiting = harness.membership(2) | {"JAX_PROCESS_ID": "0"}
    pair = [nursery.start(mine, tmp_path / name, environment=env) for name, env in (("a", lost), ("b", waiting))]
    ended(pair[:1], "process 1 of 2 waited 60 s for the others at 127.0.0.1:1: is every process started")
    ended(pair[1:], f"process 0 of 2 waited 60 s for the others at {waiting['JAX_COORDINATOR_ADDRESS']}")
