"""Checkpoints: what is saved comes back bit for bit on any mesh, damage is seen, misfits are named."""

import asyncio
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from faults import harness
from hypothesis import strategies as st
from places import ROOT

from dip_jax import config
from dip_jax.checkpoints import checkpoint, directories, items, manifest
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.models import dip
from dip_jax.runtime import sharding, storage, target
from dip_jax.training import optim, state

CONFIG = harness.tiny_config(pathlib.Path("nowhere"))
MODEL = dip.from_config(CONFIG.model)
OPTIMIZER = optim.make_optimizer(CONFIG.optim, total_steps=10)
RECORD = checkpoint.Record(CONFIG, {"fingerprint": "abc", "seed": 0, "salt": 2, "batch_size": 8}, skipped=5)


def abstract(mesh: config.Mesh) -> state.TrainState:
    made = sharding.make_mesh(mesh)
    return state.abstract_state(MODEL, OPTIMIZER, state.state_shardings(MODEL, OPTIMIZER, made, zero1=mesh.zero1))


@pytest.fixture(scope="module")
def trained() -> state.TrainState:
    """A state in which no two arrays are alike, spread over eight devices."""
    target = abstract(config.Mesh(data=2, fsdp=2, tensor=2))
    rng = np.random.default_rng(0)

    def fill(x):
        values = rng.integers(1, 99, x.shape) if x.dtype == jnp.int32 else rng.normal(size=x.shape)
        return jax.device_put(np.asarray(values, x.dtype), x.sharding)

    return jax.tree.map(fill, target)


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


def saved(folder, trained, *numbers: int, **options) -> checkpoint.Checkpoints:
    checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint(**{"keep_last": 9, **options}))
    for number in numbers:
        checkpoints.save(number, trained, RECORD)
    checkpoints.wait()
    return checkpoints


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, trained) -> pathlib.Path:
    """A workdir with the steps 2 and 4, to be copied and harmed."""
    folder = tmp_path_factory.mktemp("pristine")
    saved(folder, trained, 2, 4).close()
    return folder


@pytest.fixture
def copy(tmp_path, pristine) -> pathlib.Path:
    subprocess.run(["cp", "-r", str(pristine), str(tmp_path / "w")], check=True)
    return tmp_path / "w"


@pytest.mark.parametrize(
    "mesh", [config.Mesh(), config.Mesh(data=1, fsdp=8), config.Mesh(data=4, tensor=2, zero1=True)], ids=str
)
def test_restores_bit_for_bit_on_any_mesh(pristine, trained, mesh):
    checkpoints = checkpoint.Checkpoints(pristine, config.Checkpoint())
    found = checkpoints.find()
    assert (found.step, found.record) == (4, RECORD)
    target = abstract(mesh)
    restored = checkpoints.restore(found, target)
    assert same(restored, trained)
    assert jax.tree.all(jax.tree.map(lambda x, t: x.sharding == t.sharding and x.dtype == t.dtype, restored, target))
    checkpoints.close()


def test_kernels_that_lie_otherwise_in_memory_are_saved_as_they_are(tmp_path, trained, monkeypatch):
    """As on a TPU (`state.formats`): what is on disk does not know how it lay."""
    with monkeypatch.context() as patched:
        patched.setattr(target, "platform", lambda: "tpu")
        turned = jax.device_put(trained, state.formats(trained))
    assert any(a.format.layout.major_to_minor == (0, 2, 1, 3) for a in jax.tree.leaves(turned))
    checkpoints = saved(tmp_path, turned, 1)
    assert same(checkpoints.restore(checkpoints.find(), abstract(config.Mesh())), trained)
    checkpoints.close()


def test_save_keeps_what_it_was_given_while_training_goes_on(tmp_path):
    """The step donates its buffers: an asynchronous save must not read them afterwards."""
    target = abstract(config.Mesh())
    zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target))()
    count = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    checkpoints = checkpoint.Checkpoints(tmp_path, config.Checkpoint(keep_last=9))
    current = zeros
    for number in range(1, 6):
        current = count(current)
        checkpoints.save(number, current, RECORD)
    for _ in range(20):
        current = count(current)
    checkpoints.wait()
    for number in range(1, 6):
        found = checkpoint.Found(number, checkpoints.root / str(number), RECORD)
        restored = checkpoints.restore(found, target)
        assert all(np.all(np.asarray(leaf) == number) for leaf in jax.tree.leaves(restored))
    checkpoints.close()


def test_manifests_of_before_are_read_and_are_what_sha256sum_checks(copy):
    step = epath.Path(copy / "checkpoints" / "4")
    (step / manifest.MANIFEST).unlink()
    manifest.write_manifest(step, name=manifest.SHA256)
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", manifest.SHA256], cwd=step, check=True)
    digest = hashlib.sha256((step / "config" / "metadata").read_bytes()).hexdigest()
    assert f"{digest}  config/metadata\n" in (step / manifest.SHA256).read_text()
    markers = "".join(f"{'0' * 64}  {item}/{manifest.COMMIT}\n" for item in ("config", "ema", "state"))
    (step / manifest.SHA256).write_text((step / manifest.SHA256).read_text() + markers)  # as they were listed then
    assert manifest.damage(step) is None
    harness.flip_bit(copy / "checkpoints" / "4" / "config" / "metadata", random.Random(1))
    assert manifest.damage(step) == "config/metadata is not what was written"


def test_a_record_keeps_what_it_was_given(pristine):
    assert json.loads((pristine / "checkpoints" / "4" / "config" / "metadata").read_text())["data"]["salt"] == 2


def test_the_hash_is_fast_where_its_package_is_there():
    if manifest.xxhash is None:
        assert manifest.MANIFEST == manifest.SHA256
    else:
        assert manifest.MANIFEST == manifest.XXH128
        assert manifest._hash_of(manifest.XXH128)(b"").hexdigest() == "99aa06d3014798d86001c324468d497f"  # XXH3's published


def test_a_hash_without_its_package_is_told(copy, monkeypatch):
    step = epath.Path(copy / "checkpoints" / "4")
    (step / manifest.MANIFEST).replace(step / manifest.XXH128)
    monkeypatch.setattr(manifest, "xxhash", None)
    with pytest.raises(UserError, match="pip install xxhash"):
        manifest.damage(step)


def test_the_command_verifies_without_jax(copy):
    program = (
        "import sys; from dip_jax.checkpoints import manifest; code = manifest.main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    done = run([sys.executable, "-c", program, str(copy)])
    assert done.returncode == 0 and done.stdout.count("as it was written") == 2, done.stderr
    harness.flip_bit(copy / "checkpoints" / "4" / "ema" / "manifest.ocdbt", random.Random(1))
    done = run([sys.executable, "-m", "dip_jax.checkpoints.manifest", str(copy), str(copy / "checkpoints" / "2")])
    assert done.returncode == 1 and "4: damaged, ema/manifest.ocdbt is not what was written" in done.stdout
    assert done.stdout.count("as it was written") == 2
    done = run([sys.executable, "-m", "dip_jax.checkpoints.manifest", str(copy / "checkpoints" / "4" / "ema")])
    assert done.returncode == 2 and "holds no checkpoint" in done.stderr


@hypothesis.given(harm=st.sampled_from(sorted(harness.HARMS)), seed=st.integers(0, 2**32))
@hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_harm_to_any_file_is_seen_and_put_aside(tmp_path_factory, pristine, trained, harm, seed):
    workdir = tmp_path_factory.mktemp("harmed") / "w"
    subprocess.run(["cp", "-r", str(pristine), str(workdir)], check=True)
    rng = random.Random(seed)
    files = [f for f in harness.files_of(workdir / "checkpoints" / "4") if f.stat().st_size and f.name not in manifest.LATE]
    victim = rng.choice(files)
    harness.HARMS[harm](victim, rng)
    lines = []
    checkpoints = checkpoint.Checkpoints(workdir, config.Checkpoint(), report=lines.append)
    found = checkpoints.find()
    checkpoints.close()
    assert found.step == 2
    assert len(lines) == 1 and "checkpoint 4 is damaged" in lines[0]
    assert (workdir / "checkpoints" / "damaged" / "4").is_dir()
    assert not (workdir / "checkpoints" / "4").exists()


def test_extra_file_and_missing_manifest_are_damage(copy):
    step = epath.Path(copy / "checkpoints" / "4")
    assert manifest.damage(step) is None
    (step / "ema" / "d" / "extra").write_text("")
    assert manifest.damage(step) == "ema/d/extra is not in the manifest"
    (step / manifest.MANIFEST).unlink()
    assert manifest.damage(step) == f"{manifest.MANIFEST} is missing"


def test_nothing_but_damage_stops_the_run_and_says_so_again(copy):
    for number in (2, 4):
        (copy / "checkpoints" / str(number) / "config" / "metadata").write_text("{}")
    for _ in range(2):
        checkpoints = checkpoint.Checkpoints(copy, config.Checkpoint(), report=lambda line: None)
        with pytest.raises(UserError, match="no undamaged checkpoint is left"):
            checkpoints.find()
        checkpoints.close()
    (copy / "checkpoints" / "damaged").rename(copy / "elsewhere")
    checkpoints = checkpoint.Checkpoints(copy, config.Checkpoint())
    assert checkpoints.find() is None
    checkpoints.close()


def test_step_saved_again_after_damage_does_not_clash(copy, trained):
    for _ in range(2):
        harness.delete(copy / "checkpoints" / "4" / manifest.MANIFEST, random.Random(0))
        checkpoints = checkpoint.Checkpoints(copy, config.Checkpoint(keep_last=9), report=lambda line: None)
        assert checkpoints.find().step == 2
        checkpoints.save(4, trained, RECORD)
        checkpoints.wait()
        assert checkpoints.find().step == 4
        checkpoints.close()
    assert sorted(p.name for p in (copy / "checkpoints" / "damaged").iterdir()) == ["4", "4.2"]


def test_verification_can_be_switched_off(copy):
    (copy / "checkpoints" / "4" / manifest.MANIFEST).unlink()
    checkpoints = checkpoint.Checkpoints(copy, config.Checkpoint(verify=False))
    assert checkpoints.find().step == 4
    checkpoints.close()


def test_keep_policy_and_leftovers_of_a_kill(tmp_path, trained):
    root = tmp_path / "checkpoints"
    for name in ("todelete/7/state", "9.orbax-checkpoint-tmp/state"):
        (root / name).mkdir(parents=True)
    checkpoints = saved(tmp_path, trained, 1, 2, 3, 4, 5, 6, keep_last=2, keep_every=3)
    checkpoints.close()
    assert sorted(p.name for p in root.iterdir()) == ["3", "5", "6"]


@pytest.mark.parametrize("metric, best", [("fid", 2), ("is", 3)])
def test_the_best_step_by_a_metric_stays(tmp_path, trained, metric, best):
    """Step 1 would be best but is gone before it is judged; 5 has no number; rows of steps that do not exist count nothing."""
    judged = {1: 0.0, 2: 1.0, 3: 9.0, 4: 5.0, 5: None, 70: -1.0}
    rows = [{"step": step, "N": 0, f"{metric}_lite0": value, "sfid": -step} for step, value in judged.items()]
    (tmp_path / "eval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    saved(tmp_path, trained, 2, 3, 4, 5, 6, keep_last=1, keep_best=metric).close()
    assert directories.complete(epath.Path(tmp_path / "checkpoints")) == [best, 6]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 32}, r"does not fit this model: .*float32\[1, 8\] in the checkpoint, float32\[1, 16\] here; .*more"),
        ({"depth": 2}, r"float32\[1, .*\] in the checkpoint, float32\[2, .*\] here"),
        ({"head": "unet", "head_width": 4, "head_depth": 1}, r"not in the checkpoint"),
    ],
    ids=str,
)
def test_other_model_is_refused_with_its_leaves(pristine, change, message):
    model = dip.from_config(dataclasses.replace(CONFIG.model, **change))
    shardings = state.state_shardings(model, OPTIMIZER, sharding.make_mesh(config.Mesh()))
    checkpoints = checkpoint.Checkpoints(pristine, config.Checkpoint())
    with pytest.raises(UserError, match=message):
        checkpoints.restore(checkpoints.find(), state.abstract_state(model, OPTIMIZER, shardings))
    checkpoints.close()


def test_other_dtype_is_refused(pristine):
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype, sharding=x.sharding),
        abstract(config.Mesh()),
    )
    checkpoints = checkpoint.Checkpoints(pristine, config.Checkpoint())
    with pytest.raises(UserError, match=r"float32\[.*\] in the checkpoint, bfloat16\[.*\] here"):
        checkpoints.restore(checkpoints.find(), target)
    checkpoints.close()


def test_failed_save_stops_at_the_next_check_with_the_last_good_step(tmp_path, trained, monkeypatch):
    checkpoints = saved(tmp_path, trained, 1)

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_text", full)
    checkpoints.save(2, trained, RECORD)
    checkpoints._saving.exception()  # until the background is done
    with pytest.raises(UserError, match=r"saving .*/2 failed \(OSError.*No space left.*\); the last good one is step 1"):
        checkpoints.check()
    monkeypatch.undo()
    checkpoints.check()
    checkpoints.save(2, trained, RECORD)
    checkpoints.close()
    assert directories.complete(epath.Path(tmp_path / "checkpoints")) == [1, 2]


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}, {"data": 8, "zero1": True}], ids=str
)
def test_hosts_read_parts_and_have_the_rest_from_each_other(pristine, trained, monkeypatch, mesh):
    target = abstract(config.Mesh(**mesh))
    first = jax.tree.leaves(target)[0].sharding.mesh
    owner = {device: number // 4 for number, device in enumerate(first.devices.flat)}
    wanted, read = [], items.read_arrays
    split = functools.partial(sharding.split_over_hosts, host_of=owner.get)
    monkeypatch.setattr(checkpoint.sharding, "split_over_hosts", split)
    monkeypatch.setattr(items, "read_arrays", lambda item, target, **kw: wanted.append(target) or read(item, target, **kw))
    checkpoints = checkpoint.Checkpoints(pristine, config.Checkpoint())
    with jax.set_mesh(first):
        restored = checkpoints.restore(checkpoints.find(), target)
    checkpoints.close()
    assert same(restored, trained)
    jax.tree.map(lambda x, t: np.testing.assert_(x.sharding == t.sharding), restored, target)
    parts = [leaf for leaf in jax.tree.leaves(wanted) if "hosts" in leaf.sharding.mesh.axis_names]
    assert len(parts) > (0 if "zero1" in mesh else len(jax.tree.leaves(target)) / 2)


def test_a_save_that_takes_too_long_names_the_flag(tmp_path, trained, monkeypatch):
    write = items.ocp.JsonCheckpointHandler._save_fn

    async def slow(self, *arguments):
        await asyncio.sleep(5)  # it counts from when the arrays are copied
        await write(self, *arguments)

    monkeypatch.setattr(items.ocp.JsonCheckpointHandler, "_save_fn", slow)
    monkeypatch.setenv("JAX_SAVE_SECONDS", "1")
    with pytest.raises(UserError, match=r"saving .*1 failed \(TimeoutError.*; --save_seconds says how long it may take"):
        saved(tmp_path / "soon", trained, 1)
    monkeypatch.setenv("JAX_SAVE_SECONDS", "60")
    assert saved(tmp_path / "later", trained, 1).find().step == 1


def test_a_save_that_another_process_spoils_is_no_mistake_of_the_user(tmp_path, trained, monkeypatch):
    """Its launcher must start it again, which exit code 2 would forbid."""
    checkpoints = saved(tmp_path, trained, 1)

    def gone(path, text):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: recvmsg:Connection reset by peer")

    monkeypatch.setattr(storage, "write_text", gone)
    checkpoints.save(2, trained, RECORD)
    with pytest.raises(Interrupted, match=r"UNAVAILABLE.*the last good one is step 1; run the same command again") as caught:
        checkpoints.close()
    assert caught.value.code == Exit.CRASH


def test_load_needs_nothing_but_a_path(pristine, trained, copy):
    for path in (pristine, pristine / "checkpoints", pristine / "checkpoints" / "2", str(pristine)):
        model, params = checkpoint.load(path)
        assert model == MODEL
        assert same(params, trained.ema)
    assert same(checkpoint.load(pristine, weights="raw")[1], trained.params)
    assert same(checkpoint.load(pristine, weights="initial")[1], jax.jit(MODEL.init)(jax.random.key(CONFIG.train.seed)))


def test_first_weights_are_compiled_quickly(pristine, monkeypatch):
    """Those of a run and those of `load`: what runs once on a CPU need not be fast."""
    real, told = jax.jit, []
    monkeypatch.setattr(jax, "jit", lambda f, **options: told.append(options.get("compiler_options")) or real(f, **options))
    monkeypatch.delenv("XLA_FLAGS")  # the tests' own level stands
    quick, mesh = {"xla_backend_optimization_level": 1}, sharding.make_mesh(config.Mesh())
    checkpoint.load(pristine, weights="initial")
    assert told.count(quick) == 1
    state.init_sharded(MODEL, OPTIMIZER, 0, state.state_shardings(MODEL, OPTIMIZER, mesh))
    assert told.count(quick) == 2


def test_load_in_another_compute_dtype(pristine, trained):
    """The weights stay what they are; the products are those of a model built with that dtype."""
    inputs = jnp.ones((1, *MODEL.config.image_size, 3)), jnp.full(1, 0.5), jnp.zeros(1, jnp.int32)
    assert MODEL.config.dtype == "float32"
    model, params = checkpoint.load(pristine, dtype="bfloat16")
    assert model == dip.from_config(dataclasses.replace(MODEL.config, dtype="bfloat16")) and same(params, trained.ema)
    scattered = jax.tree.map(lambda a: a + 0.1, params)  # at the start the last layer is zero in any dtype
    assert not np.array_equal(model.apply(scattered, *inputs), MODEL.apply(scattered, *inputs))
    assert checkpoint.load(pristine, dtype="float32")[0] == checkpoint.load(pristine)[0] == MODEL
    with pytest.raises(UserError, match=r"model.dtype='float16' is unknown: it is one of float32, bfloat16"):
        checkpoint.load(pristine, dtype="float16")


def test_load_passes_over_damage_and_changes_nothing(copy, trained, capsys):
    harness.flip_bit(copy / "checkpoints" / "4" / "ema" / "manifest.ocdbt", random.Random(1))
    before = harness.files_of(copy)
    assert same(checkpoint.load(copy)[1], trained.ema)
    assert "checkpoint 4 is damaged" in capsys.readouterr().err
    assert harness.files_of(copy) == before
    harness.flip_bit(copy / "checkpoints" / "2" / "state" / "manifest.ocdbt", random.Random(1))  # not read, not checked
    assert same(checkpoint.load(copy)[1], trained.ema)
    assert "state" in manifest.damage(epath.Path(copy / "checkpoints" / "2"))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(copy / "checkpoints" / "4")


def test_load_says_what_is_wrong(tmp_path, copy):
    with pytest.raises(UserError, match="is no directory: give a workdir"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="weights='best' is unknown"):
        checkpoint.load(copy, weights="best")
    with pytest.raises(UserError, match="holds no item 'ema'"):
        subprocess.run(["rm", "-r", str(copy / "checkpoints" / "4" / "ema")], check=True)
        checkpoint.load(copy / "checkpoints" / "4", verify=False)
    (copy / "checkpoints" / "4" / "config" / "metadata").write_text("[]")
    with pytest.raises(UserError, match="no readable config item"):
        checkpoint.load(copy / "checkpoints" / "4", verify=False)


def test_weights_from_elsewhere_are_loaded_like_any_other(tmp_path, trained):
    path = checkpoint.write_weights(tmp_path / "out", trained.ema, config=CONFIG)
    assert manifest.damage(path) is None
    assert same(checkpoint.load(tmp_path / "out")[1], trained.ema)
    with pytest.raises(UserError, match="holds no item 'state'"):
        checkpoint.load(tmp_path / "out", weights="raw")
    with pytest.raises(UserError, match="exists already"):
        checkpoint.write_weights(tmp_path / "out", trained.ema, config=CONFIG)
