"""A covering design of training steps, sampling calls and feature networks through the accelerators' own compilers.

`pytest --aot tests/planning/test_ahead_programs.py`. Every pair of values of two factors named together stands in a row.
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import aot_programs as programs
import pytest
from covering import cover, pairs_of

from dip_jax.planning import hlo, topologies

MACHINES = {"v5e": "v5e-{}", "v5p": "v5p-{}", "v6e": "v6e-{}", "h100": "h100x{}"}
TRAINING = {
    "kind": tuple(MACHINES),
    "size": (4, 8, 1),
    "mesh": tuple(programs.MESHES),
    "head": ("unet", "mlp", "coord_mlp", "attention", "none"),
    "placement": ("post_hoc", "intermediate", "hybrid", "residual"),
    "remat": ("dots", "none", "full"),
    "scan": (True, False),
    "repa": ("", "mlp", "conv"),
    "more": ("", "internal", "context", "accumulate"),
}
TOGETHER = [("kind", "mesh"), ("kind", "head"), ("kind", "repa"), ("kind", "size"), ("head", "placement"), ("remat", "scan")]
TOGETHER += [("mesh", "repa"), ("mesh", "scan"), ("mesh", "size"), ("head", "remat"), ("more", "mesh")]
SAMPLING = {
    "kind": tuple(MACHINES),
    "solver": ("euler", "heun", "ab2", "sde"),
    "batch": (1, 64),
    "ahead": (True, False),
    "internal": (True, False),
    "head": ("unet", "attention", "none"),
}
SUPPORT = pathlib.Path(__file__).parents[1] / "support"
STEPS, SAMPLES = 24, 19  # rows of the two


@functools.cache
def training_rows():
    def allowed(row):
        alone = row["size"] == 1
        headless = row["head"] == "none" and row["placement"] != "post_hoc"
        return alone == (row["mesh"] == "one") and not headless and not (alone and row["kind"] == "v5p")

    return cover(TRAINING, TOGETHER, allowed)


@functools.cache
def sampling_rows():
    return cover(SAMPLING, list(itertools.combinations(SAMPLING, 2)), lambda row: row["ahead"] or row["batch"] == 64)


def machine_of(kind: str, size: int) -> str:
    return MACHINES[kind].format(2 * size if kind == "v5p" else size)


def test_every_pair_is_covered():
    small, together = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2)}, [("a", "b"), ("b", "c")]
    rows = cover(small, together, lambda row: row["a"] != 3 or row["b"] == 1)
    found = set().union(*(pairs_of(row, together) for row in rows))
    assert ("a", 3, "b", 2) not in found and len(found) == 5 + 4 and len(rows) == 5


@pytest.mark.aot
@pytest.mark.parametrize("number", range(STEPS))
def test_training(number):
    assert len(training_rows()) == STEPS
    row = training_rows()[number]
    machine = machine_of(row["kind"], row["size"])
    programs.require(machine)
    print(row)
    model = {"head": row["head"], "placement": row["placement"], "remat": row["remat"], "scan_layers": row["scan"]}
    model |= {"internal": row["more"] == "internal", "context_tokens": programs.CONTEXT * (row["more"] == "context")}
    repa = {"weight": 0.5 * bool(row["repa"]), "layer": 2, "projector": row["repa"] or "mlp"}
    accumulate = 2 if row["more"] == "accumulate" else 1
    whole = programs.changed(model=model, repa=repa, optim={"accumulate": accumulate})
    programs.check_train(machine, row["mesh"], whole)


@pytest.mark.aot
@pytest.mark.parametrize("number", range(SAMPLES))
def test_sampling(number):
    assert len(sampling_rows()) == SAMPLES
    row = sampling_rows()[number]
    machine = machine_of(row["kind"], 4 if row["ahead"] else 1 if row["kind"] != "v5p" else 4)
    programs.require(machine)
    print(row)
    depth, steps = (programs.LAYERS, 20) if row["ahead"] else (40, 1000)  # more than `trajectories.AHEAD_BYTES` of modulations
    sample = {"solver": row["solver"], "steps": steps, "batch_size": row["batch"]}
    sample |= {"internal_guidance": 1.5 if row["internal"] else 1.0}
    whole = programs.changed(model={"head": row["head"], "internal": row["internal"], "depth": depth}, sample=sample)
    found, text, whole = programs.compiled(machine, job="sample", whole=whole)
    images = max(row["batch"], *found.mesh.values())
    travels = programs.pixels(whole, images) + images  # and whether each is finite
    assert [one for one in found.collectives if one.size > travels] == [], "more than the finished images travels"
    assert found.total_bytes < topologies.parse(machine).memory
    in_steps = {hlo.source_of(one) for one, _ in programs.products(text)}
    made_in_steps = [name for name in in_steps if name.count("/while/") > 1 and "/modulation/" in name]
    assert (made_in_steps == []) == row["ahead"], "modulations of all steps before the first, where they fit"
    if row["kind"] == "h100":
        assert found.kernels["__cudnn$fmhaSoftmax"] >= 1 and "__cudnn$fmhaSoftmaxBackward" not in found.kernels


@pytest.mark.aot
@pytest.mark.parametrize("network", ["inception", "lite0"])
@pytest.mark.parametrize("machine", ["v5e-4", "v5p-8", "v6e-1", "h100x1"])
def test_feature_networks(network, machine):
    programs.require(machine)
    environment = os.environ | topologies.environment(topologies.parse(machine))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [SUPPORT, SUPPORT.parents[1]]))
    command = [sys.executable, "-m", "feature_programs", network, machine]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, child.stderr[-500:]
    facts = json.loads(child.stdout.splitlines()[-1])
    assert facts["collectives"] == [] and facts["bytes"] < topologies.parse(machine).memory / 4
