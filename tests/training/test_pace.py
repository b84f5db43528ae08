"""What a run says of itself: speed and share of the peak by hand, bytes by the arrays that are there, its first lines."""

import dataclasses
import re

import jax
import pytest
from faults import harness
from small_models import small

from dip_jax import config
from dip_jax.jobs import train
from dip_jax.models import cost, dip
from dip_jax.runtime import accelerators, sharding, writers
from dip_jax.training import optim, pace, repa, state, workload

ALIGNED = config.Repa(weight=0.5, layer=1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock[0]` is moved."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_the_share_of_the_peak_is_flops_over_time_by_hand(clock):
    measured = pace.Pace(start=4, batch_size=8, flops_per_image=3_000, peak_flops=2 * 60_000.0)
    assert measured.measure(4) == {}  # no step was done: no "0 images/s"
    clock[0] += 2.0
    found = measured.measure(14)  # 10 steps of 8 images of 3,000 FLOPs in 2 s: 120,000 FLOP/s of 120,000
    assert found == {"images_per_second": 40.0, "seconds_per_step": 0.2, "data_wait": 0.0, "mfu": 1.0}
    clock[0] += 7.0
    measured.restart(14)  # saving took 7 s
    clock[0] += 4.0
    assert measured.measure(24)["mfu"] == 0.5
    unknown = pace.Pace(start=0, batch_size=8, flops_per_image=3_000, peak_flops=None)
    clock[0] += 1.0
    assert unknown.measure(1).keys() == {"images_per_second", "seconds_per_step", "data_wait"}


def test_waiting_counts_where_the_devices_wait_as_well(clock):
    measured = pace.Pace(start=0, batch_size=8, flops_per_image=1, peak_flops=None)
    for idle in (True, False):
        with measured.waiting(lambda idle=idle: idle):
            clock[0] += 1.0
    clock[0] += 2.0
    assert measured.measure(2)["data_wait"] == 0.25
    clock[0] += 1.0
    assert measured.measure(3)["data_wait"] == 0.0


def test_a_training_step_costs_three_passes_and_the_teacher():
    model = small(head="unet").config
    forward = sum(cost.forward_flops(model).values())
    assert workload.step_flops(model, None) == 3 * forward
    alignment = repa.align(ALIGNED, model)
    teacher = cost.teacher_flops(alignment.encoder, image_size=model.image_size, grid=alignment.projector.grid)
    projector = cost.projector_flops(alignment.projector)
    assert workload.step_flops(model, alignment) == 3 * forward + teacher + 3 * projector


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200")],
)
def test_the_peak_goes_by_what_jax_calls_the_device(kind, name):
    assert accelerators.peak_flops(kind) == accelerators.ACCELERATORS[name].flops


@pytest.mark.parametrize("kind", ["cpu", "TPU v5 lite", "NVIDIA H100 PCIe"])
def test_an_unknown_peak_is_left_out(kind):
    assert accelerators.peak_flops(kind) is None


@pytest.mark.parametrize(
    "options",
    [config.Optim(), config.Optim(warmup_steps=5), config.Optim(schedule="cosine", warmup_steps=5)],
    ids=["constant", "warmup", "cosine"],
)
def test_the_logged_learning_rate_is_the_schedule(options):
    schedule = optim.learning_rate(options, total_steps=20)
    with jax.numpy_dtype_promotion("standard"):
        expected = [float(schedule(updates)) for updates in range(25)]
    found = [optim.learning_rate_after(updates, options, total_steps=20) for updates in range(25)]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_planned_bytes_are_those_of_the_arrays(dataset):
    options = harness.tiny_config(dataset, mesh__fsdp=2)
    model = dip.from_config(options.model)
    optimizer = optim.make_optimizer(options.optim, total_steps=4)
    mesh = sharding.make_mesh(options.mesh)
    with jax.set_mesh(mesh):
        placed = state.state_shardings(model, optimizer, mesh)
        planned = workload.planned_bytes(model, state.abstract_state(model, optimizer, placed), {}, images=1)
        arrays = state.init_sharded(model, optimizer, 0, placed)
        half = dip.from_config(dataclasses.replace(options.model, dtype="bfloat16"))
        gradients = [
            workload.planned_bytes(half, state.abstract_state(half, optimizer, placed), {}, images=1, accumulate=parts)[
                "gradients"
            ]
            for parts in (1, 2)
        ]
    assert gradients == [planned["params"] // 2, planned["params"]]
    device = jax.devices()[0]
    held = {"params": arrays.params, "optimizer": arrays.opt_state, "ema": arrays.ema}
    for name, tree in held.items():
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device]
        assert planned[name] == sum(shard.data.nbytes for shard in shards), name
    assert planned["params"] < 4 * workload.count(arrays.params) and planned["gradients"] == planned["params"]


def test_a_run_says_what_it_is_before_compiling_and_how_it_goes(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerators, "peak_flops", lambda kind: 1e9 if kind == "cpu" else None)
    seen = []
    init = state.init_sharded
    said = lambda *args, **named: seen.append(capsys.readouterr().err) or init(*args, **named)  # noqa: E731
    monkeypatch.setattr(state, "init_sharded", said)
    options = harness.tiny_config(dataset, train__steps=4, checkpoint__every_steps=4, optim__warmup_steps=2)
    train.train(options, workdir=tmp_path / "run")
    lines = seen[0].splitlines()
    total = workload.count(jax.eval_shape(dip.from_config(options.model).init, jax.random.key(0)))
    assert lines[0] == "devices: 8 x cpu, mesh data 8 x fsdp 1 x tensor 1, 1 process"
    assert lines[1] == f"data: 48 images, 3 classes, {dataset}"
    assert lines[2].startswith(f"model: {total:,} parameters, 0 in the head; GFLOP per image: ")
    assert re.match(r"memory planned per device, 1 image at a time: [\d.]+ MiB \(params .* activations ", lines[3])
    assert lines[4] == "compiling; then a line every 10 s, and rows of metrics.jsonl by train.log_every=1"
    rows = writers.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["learning_rate"] for row in rows] == [0.0, 5e-4, 1e-3, 1e-3]
    assert "images_per_second" not in rows[0]  # the step that compiled is no measurement
    for row in rows[1:]:
        assert row["mfu"] == pytest.approx(row["images_per_second"] * workload.step_flops(options.model, None) / 8e9)
        assert row["images_per_second"] * row["seconds_per_step"] == pytest.approx(8)
        assert 0 <= row["data_wait"] <= 1
    assert " 0 images/s" not in capsys.readouterr().err
