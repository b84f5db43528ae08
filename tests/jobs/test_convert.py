"""`convert`: from a file on disk to a checkpoint that loads; every file that does not fit is one clear line."""

import pickle

import jax
import numpy as np
import pytest
from parity_cases import NUM_CLASSES
from published import tensors, write

from dip_jax.checkpoints import checkpoint
from dip_jax.errors import UserError
from dip_jax.jobs import convert


@pytest.mark.parametrize("source", convert.SOURCES)
def test_a_file_becomes_a_checkpoint_that_loads(tmp_path, source):
    values = tensors(source)
    file = write(tmp_path / "w.safetensors", values)
    step = convert.convert(source, checkpoint=file, out=tmp_path / "out", image_size=8)
    assert step.is_dir()
    model, params = checkpoint.load(tmp_path / "out")
    assert (model.config.depth, model.config.width, model.config.num_heads, model.config.patch_size) == (2, 32, 2, 4)
    assert model.config.num_classes == NUM_CLASSES and model.config.image_size == (8, 8)
    assert model.config.head == {"pixnerd": "coord_mlp", "ddt": "none"}[source]
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    assert sum(a.size for a in jax.tree.leaves(params)) == sum(a.size for a in values.values())
    np.testing.assert_array_equal(params["condition"]["label"]["table"], values["y_embedder.embedding_table.weight"])
    with pytest.raises(UserError, match="exists already"):
        convert.convert(source, checkpoint=file, out=tmp_path / "out", image_size=8)


def test_averaged_weights_of_a_lightning_checkpoint_win():
    values = tensors()
    mixed = {f"denoiser.{name}": value + 1 for name, value in values.items()}
    mixed |= {f"ema_denoiser.{name}": value for name, value in values.items()}
    mixed |= {"diffusion_trainer.proj.weight": np.ones((3, 3), np.float32)}
    expected = convert.from_tensors(values, source="pixnerd", image_size=8)[1]
    for chosen, offset in ((mixed, 0), ({k: v for k, v in mixed.items() if not k.startswith("ema_")}, 1)):
        _, params = convert.from_tensors(chosen, source="pixnerd", image_size=8)
        jax.tree.map(lambda a, b, offset=offset: np.testing.assert_array_equal(a, b + np.float32(offset)), params, expected)


def test_half_precision_becomes_float32():
    values = {name: value.astype(np.float16) for name, value in tensors().items()}
    _, params = convert.from_tensors(values, source="pixnerd", image_size=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def _without(values, name):
    return {key: value for key, value in values.items() if key != name}


def _renamed(values, name):
    return {key + "x" * (key == name): value for key, value in values.items()}


def _changed(values, name, change):
    return {**values, name: change(values[name])}


W2 = "blocks.1.mlp.w2.weight"
MISTAKES = {
    "missing": (lambda v: _without(v, W2), rf"1 tensors do not fit .*{W2}: missing"),
    "renamed": (lambda v: _renamed(v, W2), rf"2 tensors do not fit .*{W2}: missing; {W2}x: extra"),
    "transposed": (lambda v: _changed(v, W2, np.transpose), rf"{W2}: \[85, 32\] instead of \[32, 85\]"),
    "extra": (lambda v: v | {"blocks.0.gamma": v[W2]}, r"blocks.0.gamma: extra"),
    "other width": (lambda v: _changed(v, "s_embedder.proj.weight", lambda a: a[:16]), r"tensors do not fit .* and \d+ more"),
    "no embedding": (
        lambda v: _without(v, "s_embedder.proj.weight"),
        r"s_embedder.proj.weight, which tells the sizes, is missing",
    ),
    "latent": (lambda v: _changed(v, "s_embedder.proj.weight", lambda a: a[:, :16]), r"16 columns, not 3 P\^2"),
    "odd heads": (lambda v: _changed(v, "blocks.0.attn.q_norm.weight", lambda a: a[:5]), "5 entries, which do not divide"),
    "a layer less": (
        lambda v: {k: x for k, x in v.items() if not k.startswith("blocks.0.")},
        "which tells the sizes, is missing",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tensors_that_do_not_fit_are_listed_in_one_line(tmp_path, mistake):
    change, message = MISTAKES[mistake]
    file = write(tmp_path / "w.safetensors", change(tensors()))
    with pytest.raises(UserError, match=message) as caught:
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=8)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_files_and_sizes_are_refused(tmp_path):
    file = write(tmp_path / "w.safetensors", tensors())
    with pytest.raises(UserError, match=r"x_embedder.proj.weight, which tells the sizes, is missing: is --from right"):
        convert.convert("ddt", checkpoint=file, out=tmp_path / "out", image_size=8)
    with pytest.raises(UserError, match=r"not a multiple of model.patch_size=4"):
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=10)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=8)


def test_a_malicious_pickle_is_refused_unexecuted(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    file = tmp_path / "w.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(UserError, match=r"w\.ckpt"):
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=8)
    assert not (tmp_path / "executed").exists()
