"""REPA in the training step: the flow loss stays as it is, the projector is trained and saved, the average has none of it."""

import dataclasses
import functools

import dinov2_cases
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from faults import harness
from safetensors.numpy import save_file

import dip_jax
from dip_jax import config
from dip_jax.checkpoints.manifest import MANIFEST
from dip_jax.errors import UserError
from dip_jax.jobs import info, train
from dip_jax.models import dinov2, dip
from dip_jax.runtime import sharding, writers
from dip_jax.training import repa, state, step
from dip_jax.training.optim import make_optimizer

ENCODER = dinov2.DinoV2(width=64, depth=1, table_side=3)
MODEL = dip.from_config(
    config.Model(
        size="tiny",
        depth=3,
        width=32,
        num_heads=2,
        patch_size=8,
        image_size=(16, 16),
        num_classes=3,
        head="none",
        dtype="float32",
        remat="none",
    )
)
OPTIM = config.Optim(learning_rate=1e-3, ema_decays=(0.9,))
ONE = config.Mesh(data=1)
ON = config.Repa(weight=0.5, layer=2)


@functools.cache
def frozen():
    return dinov2.from_torch(dinov2_cases.random_tensors(ENCODER))[1]


def batch(k: int) -> dict:
    rng = np.random.default_rng(k)
    return {
        "image": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        "label": rng.integers(0, 3, 8).astype(np.int32),
    }


@functools.cache
def run(options: config.Repa, steps: int, *, mesh=ONE, devices=1, optim=OPTIM):
    """The state and the metrics of every step."""
    made = sharding.make_mesh(mesh, jax.devices()[:devices])
    alignment = repa.align(options, MODEL.config, ENCODER)
    optimizer = make_optimizer(optim, total_steps=100)
    with jax.set_mesh(made):
        shardings = state.state_shardings(MODEL, optimizer, made, zero1=mesh.zero1, alignment=alignment)
        teacher, places = (), None
        if alignment:
            places = jax.tree.map(lambda a: a.sharding, repa.abstract_teacher(alignment, made))
            teacher = (jax.device_put(frozen(), places),)
        kinds = {"objective": config.Flow(), "optim": optim, "alignment": alignment, "frozen": places}
        compiled = step.compile_train_step(MODEL, optimizer, shardings, made, **kinds)
        current = state.init_sharded(MODEL, optimizer, 0, shardings, alignment=alignment)
        history = []
        for k in range(steps):
            current, metrics = compiled(current, batch(k), jax.random.key(7), *teacher)
            history.append({name: float(value) for name, value in metrics.items()})
    return current, history


def same(a, b, *, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


def test_the_flow_loss_of_the_first_step_is_that_without_alignment():
    plain, (without,) = run(config.Repa(), 1)
    aligned, (found,) = run(ON, 1)
    assert found["loss_flow"] == without["loss"] and "loss_flow" not in without
    assert 0 < found["loss_repa"] < 2
    assert found["loss"] == pytest.approx(found["loss_flow"] + 0.5 * found["loss_repa"], rel=1e-6)
    assert jax.tree.map(jnp.shape, aligned.ema) == jax.tree.map(jnp.shape, plain.ema)
    assert jax.tree.map(jnp.shape, aligned.weights) == jax.tree.map(jnp.shape, plain.params)
    assert set(aligned.params) - set(plain.params) == {repa.PROJECTOR}


def test_the_models_first_weights_are_those_without_alignment():
    plain, aligned = run(config.Repa(), 0)[0], run(ON, 0)[0]
    jax.tree.map(np.testing.assert_array_equal, plain.params, aligned.weights)


def test_alignment_reaches_the_blocks_up_to_its_own_and_the_projector():
    """Against the step that it disturbs: with weight 0.5 the gradient differs in blocks 1 and 2, and in none after."""
    plain, aligned = run(config.Repa(), 1)[0], run(ON, 1)[0]
    blocks = plain.ema["blocks"], aligned.ema["blocks"]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).reshape(a.shape[0], -1).max(1), *blocks)
    largest = np.max(jax.tree.leaves(moved), axis=0)  # per block
    assert (largest[:2] > 1e-6).all() and largest[2] < 1e-7
    start = run(ON, 0)[0].params[repa.PROJECTOR]
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, aligned.params[repa.PROJECTOR])), strict=True))


def test_twenty_steps_pull_the_tokens_to_the_teacher():
    _, history = run(dataclasses.replace(ON, weight=5.0), 40, optim=dataclasses.replace(OPTIM, learning_rate=1e-2))
    losses = [row["loss_repa"] for row in history]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    "options",
    [
        {"projector": "conv", "spatial_norm": True},
        pytest.param({"layer": 3}, marks=pytest.mark.slow),
        pytest.param({"layer": 1}, marks=pytest.mark.slow),
    ],
)
def test_other_projectors_and_blocks(options):
    _, (row,) = run(dataclasses.replace(ON, **options), 1)
    assert np.isfinite(row["loss_repa"]) and row["loss_flow"] == run(config.Repa(), 1)[1][0]["loss"]


@pytest.mark.parametrize(
    "mesh", [config.Mesh(data=2, fsdp=2, tensor=2), pytest.param(config.Mesh(data=8, zero1=True), marks=pytest.mark.slow)]
)
def test_a_mesh_of_eight_is_one_device(mesh):
    one, eight = run(ON, 2), run(ON, 2, mesh=mesh, devices=8)
    same(one[0].params, eight[0].params, rtol=2e-5)
    for a, b in zip(one[1], eight[1], strict=True):
        assert {key: pytest.approx(value, rel=1e-4) for key, value in a.items()} == b


def test_micro_batches_are_the_batch():
    whole, parts = run(ON, 2), run(ON, 2, optim=dataclasses.replace(OPTIM, accumulate=2))
    same(whole[0].params, parts[0].params, rtol=2e-5)
    assert parts[1][0]["loss_repa"] == pytest.approx(whole[1][0]["loss_repa"], rel=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "dinov2.safetensors"
    save_file(dinov2_cases.random_tensors(ENCODER), path)
    return path


@pytest.fixture
def tiny(dataset, teacher):
    def make(**changes):
        options = {"repa__weight": 0.5, "repa__layer": 1, "repa__encoder": str(teacher)}
        return harness.tiny_config(dataset, **{"train__steps": 4, **options, **changes})

    return make


def test_a_resume_is_exact_and_the_teacher_is_not_in_the_checkpoint(tiny, teacher, tmp_path):
    train.train(tiny(), workdir=tmp_path / "whole")
    train.train(tiny(train__steps=2), workdir=tmp_path / "parts")
    train.train(tiny(), workdir=tmp_path / "parts")
    files = {}
    for name in ("whole", "parts"):
        manifest = (tmp_path / name / "checkpoints" / "4" / MANIFEST).read_text()
        files[name] = {line.split("  ")[1]: line.split("  ")[0] for line in manifest.splitlines()}
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert all("loss_flow" in line and "loss_repa" in line for line in lines) and len(lines) == 4
    curves = [harness.curve(tmp_path / name) for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    for weights in ("raw", "ema"):
        (_, a), (model, b) = (dip_jax.load(tmp_path / name, weights=weights) for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert jax.tree.structure(b) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0)))
    with ocp.PyTreeCheckpointer() as reader:
        stored = reader.metadata(tmp_path / "whole" / "checkpoints" / "4" / "state").item_metadata.tree
    assert stored["params"].keys() - b.keys() == {repa.PROJECTOR} and stored.keys() == {"step", "params", "opt_state"}


def test_another_teacher_is_refused_and_a_moved_one_is_not(tiny, tmp_path, teacher):
    train.train(tiny(train__steps=2), workdir=tmp_path / "run")
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(teacher.read_bytes())
    save_file({name: value + 1 for name, value in dinov2_cases.random_tensors(ENCODER).items()}, other)
    with pytest.raises(UserError, match=r"other.safetensors has SHA-256 .* trained with a teacher of .*: name that file"):
        train.train(tiny(repa__encoder=str(other)), workdir=tmp_path / "run")
    train.train(tiny(repa__encoder=str(moved)), workdir=tmp_path / "run")
    assert harness.steps_of(tmp_path / "run")[-1] == 4


def test_another_projector_is_no_change_that_can_be_allowed(tiny, tmp_path):
    train.train(tiny(train__steps=2), workdir=tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = tiny(repa__projector="conv")
    with pytest.raises(UserError, match=r"repa.projector: mlp -> conv\): choose another --workdir$"):
        train.train(other, workdir=tmp_path / "run")
    with pytest.raises(UserError, match=r"--allow_change does not help with repa.projector"):
        train.train(other, workdir=tmp_path / "run", allow_change=["repa.projector"])
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_alignment_can_be_taken_away_but_not_added(tiny, tmp_path):
    train.train(tiny(train__steps=2), workdir=tmp_path / "run")
    off = tiny(repa__weight=0.0)
    with pytest.raises(UserError, match=r"repa.weight: 0.5 -> 0.0.*--allow_change=repa.weight"):
        train.train(off, workdir=tmp_path / "run")
    train.train(off, workdir=tmp_path / "run", allow_change=["repa.weight"])
    rows = writers.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert ["loss_repa" in row for row in rows] == [True, True, False, False]
    with pytest.raises(UserError, match=r"began without alignment .*taken away from a run but not added"):
        train.train(tiny(train__steps=6), workdir=tmp_path / "run", allow_change=["repa.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repa__encoder": ""}, "repa.weight=0.5 needs repa.encoder: .*dinov2_vitb14_pretrain.pth, 346378731 bytes"),
        ({"repa__encoder": "/nowhere/d.pth"}, "/nowhere/d.pth: no such file; .*DINOv2 ViT-B/14"),
        ({"repa__layer": 2}, r"repa.layer=2 is no block of a model with model.depth=1"),
        ({"model__patch_size": 16, "repa__spatial_norm": True}, r"here is one: set repa.spatial_norm=False"),
    ],
)
def test_what_is_missing_is_told_before_compiling(tiny, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(step, "compile_train_step", lambda *a, **k: pytest.fail("compiled"))
    with pytest.raises(UserError, match=message):
        train.train(tiny(**changes), workdir=tmp_path / "run")


def test_info_counts_the_teacher_without_its_file():
    model = config.Model(dtype="bfloat16")
    facts = info.describe(config.Config(model=model, repa=config.Repa(weight=0.5)), mesh=ONE)
    plain = info.describe(config.Config(model=model), mesh=ONE)
    assert facts["repa"]["teacher_flops"] == pytest.approx(46.5e9, rel=0.01)
    assert facts["repa"]["share_of_step"] < 0.08
    assert facts["repa"]["projector_parameters"] == 2 * (1152 * 1152 + 1152) + 1152 * 768 + 768
    assert facts["bytes_per_device"]["teacher"] == pytest.approx(4 * 86.6e6, rel=0.02)
    assert facts["parameters"] == plain["parameters"] and plain["repa"] is None
    assert "REPA, weight 0.5: teacher 46." in info.tables(facts)
