"""A release: one folder that loads, tells nothing of the machine, and outlives git, a new card and Orbax's other versions."""

import dataclasses
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from faults import harness
from small_models import randomise

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint, items, manifest, release
from dip_jax.errors import Exit, UserError
from dip_jax.jobs import convert
from dip_jax.models import dip

PRIVATE = "/home/somebody"
CLASSES = ("cat", "dog", "yak")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with one step, and its averaged weights."""
    run = harness.tiny_config(pathlib.Path(f"{PRIVATE}/pictures"), eval__reference=f"{PRIVATE}/pictures/validation")
    run = dataclasses.replace(run, sample=dataclasses.replace(run.sample, steps=2))
    params = randomise(jax.jit(dip.from_config(run.model).init)(jax.random.key(0)))
    workdir = tmp_path_factory.mktemp("run")
    path = workdir / "checkpoints" / "7"
    with items.open_writer(lambda: manifest.write_manifest(epath.Path(path))) as writer:
        record = checkpoint.Record(run, {"fingerprint": "abc", "seed": 0}, classes=CLASSES)
        writer.save(path, args=items.compose({"ema": params}, record))
    return workdir, params


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_loads_as_float32_and_is_stored_as_asked(trained, tmp_path, dtype):
    workdir, params = trained
    path = convert.make_release(workdir, out=tmp_path / "r", dtype=dtype)
    model, loaded = checkpoint.load(path)
    rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(jnp.float32), params)
    assert equal(loaded, rounded)
    assert {str(x.dtype) for x in jax.tree.leaves(loaded)} == {"float32"}
    assert model.config == checkpoint.read_record(epath.Path(workdir / "checkpoints" / "7")).config.model
    record = checkpoint.read_record(path)
    assert record.classes == CLASSES and record.stored == dtype
    assert not (path / "state").exists()


def test_what_is_drawn_into_it_is_no_damage(trained, tmp_path):
    path = convert.make_release(trained[0], out=tmp_path / "r", dtype="float32")
    (path / "sweep" / "drawing").mkdir(parents=True)
    (path / "sweep" / "drawing" / "000.npz").write_bytes(b"samples")
    assert manifest.damage(path) is None
    checkpoint.load(path)
    (path / "ema" / "more").write_bytes(b"weights")
    assert manifest.damage(path) == "ema/more is not in the manifest"


def test_bfloat16_halves_the_bytes(trained, tmp_path):
    def arrays(path) -> int:
        return sum(file.stat().st_size for file in (pathlib.Path(path) / "ema").glob("ocdbt.process_0/d/*"))

    full, half = (convert.make_release(trained[0], out=tmp_path / dtype, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert arrays(half) < 0.75 * arrays(full)  # of a tiny model much is names


def test_nothing_in_it_tells_where_it_was_made(trained, tmp_path):
    path = convert.make_release(trained[0], out=tmp_path / "r")
    for file in pathlib.Path(path).rglob("*"):
        text = file.read_bytes() if file.is_file() else b""
        assert PRIVATE.encode() not in text and str(tmp_path).encode() not in text and str(trained[0]).encode() not in text, (
            file
        )
    run = checkpoint.read_record(path).config
    assert (run.data.path, run.eval.reference) == ("datasets/pictures", "datasets/pictures/validation")
    relative = dataclasses.replace(run, eval=dataclasses.replace(run.eval, reference="other/set"))
    assert release.without_places(relative) == relative


def test_git_brings_it_back_and_a_new_card_changes_nothing(trained, tmp_path):
    path = convert.make_release(trained[0], out=tmp_path / "here" / "r")
    assert all(file.stat().st_size for file in pathlib.Path(path).rglob("*") if file.is_file())
    (path / "README.md").write_text("# Mine\n")
    (path / ".gitattributes").write_text("* text=auto\n")  # as a hub puts there
    (path / "report.html").write_text("as evaluate --workdir writes")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path / "here")]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    subprocess.run(["git", "clone", "-q", str(tmp_path / "here"), str(tmp_path / "there")], check=True)
    assert equal(checkpoint.load(tmp_path / "there" / "r")[1], trained[1])
    subprocess.run(["sha256sum", "--check", "--quiet", manifest.SHA256], cwd=tmp_path / "there" / "r", check=True)
    victim = max((tmp_path / "there" / "r" / "ema").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(tmp_path / "there" / "r")


def test_the_card_says_what_is_known(trained, tmp_path):
    path = convert.make_release(trained[0], out=tmp_path / "my_model", dtype="bfloat16")
    card = (path / "README.md").read_text()
    count = sum(x.size for x in jax.tree.leaves(trained[1]))
    for words in (f"| parameters | {count:,}, stored in bfloat16 |", "2. yak", 'dip_jax.load("my_model")', "| steps | 7 of "):
        assert words in card
    assert "TODO" in card and "{" not in card


def test_the_command_and_its_mistakes(trained, tmp_path, capsys):
    arguments = ["convert", "--to=release", f"--checkpoint={trained[0]}", f"--out={tmp_path / 'r'}"]
    assert main([*arguments, "--dtype=bfloat16"]) == Exit.DONE
    assert "complete its README.md" in capsys.readouterr().out
    assert main(arguments) == Exit.USER_ERROR
    assert "exists already: choose another --out" in capsys.readouterr().err
    assert main([*arguments[:-1], f"--out={tmp_path / 'r.pth'}"]) == Exit.USER_ERROR
    assert main([*arguments[:-1], f"--out={tmp_path / 'q'}", "--image_size=8"]) == Exit.USER_ERROR
    assert main(["sample", f"--checkpoint={tmp_path / 'r'}", "--num_samples=2", f"--out={tmp_path / 'a.npz'}"]) == Exit.DONE
    assert np.load(tmp_path / "a.npz")["arr_0"].shape[0] == 2
    assert not (tmp_path / "q").exists()


def test_a_backbone_from_elsewhere_leaves_no_first_weights_to_judge(trained, tmp_path):
    record = checkpoint.read_record(epath.Path(trained[0] / "checkpoints" / "7"))
    started = dataclasses.replace(record.config.train, init_from="/somewhere")
    record = dataclasses.replace(record, config=dataclasses.replace(record.config, train=started))
    path = release.write_release(tmp_path / "r", trained[1], record, step=7)
    assert checkpoint.read_record(path).data == {} and checkpoint.read_record(path).config.train.init_from == ""
    assert isinstance(record.config, config.Config)
