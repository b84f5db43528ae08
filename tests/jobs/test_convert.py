"""`convert`: from a file on disk to a checkpoint that loads, and back; every file that does not fit is one clear line."""

import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import MODELS, tensors, write

from dip_jax import __main__, config
from dip_jax.checkpoints import checkpoint, torch_file, torch_names
from dip_jax.checkpoints.torch_tables import NETWORKS
from dip_jax.errors import UserError
from dip_jax.jobs import convert
from dip_jax.models import dip
from dip_jax.training import state


def read_in(values, source="pixnerd"):
    return torch_names.to_params(values, source=source, image_size=MODELS[source].image_size)


@pytest.mark.parametrize("source", NETWORKS)
def test_a_file_becomes_a_checkpoint_that_loads_and_the_same_file_again(tmp_path, source, capsys):
    values = tensors(source)
    file = write(tmp_path / "w.safetensors", values)
    step = convert.convert(checkpoint=file, out=tmp_path / "out", image_size=MODELS[source].image_size)
    assert step.is_dir() and f": {source}, 2 x 32, 2 heads, patch" in capsys.readouterr().err
    model, params = checkpoint.load(tmp_path / "out")
    assert model.config == MODELS[source]
    assert sum(a.size for a in jax.tree.leaves(params)) == sum(a.size for a in values.values())
    np.testing.assert_array_equal(params["condition"]["label"]["table"], values["y_embedder.embedding_table.weight"])
    with pytest.raises(UserError, match="exists already"):
        convert.convert(source, checkpoint=file, out=tmp_path / "out", image_size=MODELS[source].image_size)
    for target in ("safetensors", *{"dip", "pixnerd"}.intersection([source])):
        target = target if target == "safetensors" else f"{target}-pytorch"
        back = torch_file.read_tensors(convert.export(target, checkpoint=tmp_path / "out", out=tmp_path / target))
        assert {name: tensor.tobytes() for name, tensor in back.items()} == {n: v.tobytes() for n, v in values.items()}
        assert {name: tensor.shape for name, tensor in back.items()} == {name: value.shape for name, value in values.items()}
        assert config.from_dict(json.loads((tmp_path / f"{target}.json").read_text())).model == model.config


@pytest.mark.parametrize("source", NETWORKS)
def test_every_parameter_becomes_tensors_and_comes_back_bit_by_bit(source):
    model = dip.from_config(MODELS[source])
    key = jax.random.key(0)
    shapes = jax.eval_shape(model.init, key)
    # Any bits, not only those of finite numbers.
    ours = jax.tree.map(lambda leaf: np.random.RandomState(leaf.size).bytes(4 * leaf.size), shapes)
    ours = jax.tree.map(lambda data, leaf: np.frombuffer(data, np.float32).reshape(leaf.shape), ours, shapes)
    there = dict(torch_names.to_tensors(ours, model.config))
    back = read_in(there, source)[1]
    assert jax.tree.map(lambda a: (a.shape, a.tobytes()), back) == jax.tree.map(lambda a: (a.shape, a.tobytes()), ours)


def test_averaged_weights_of_a_lightning_checkpoint_win():
    values = tensors()
    mixed = {f"denoiser._orig_mod.{name}": value + 1 for name, value in values.items()}
    mixed |= {f"ema_denoiser.{name}": value for name, value in values.items()}
    mixed |= {"diffusion_trainer.proj.weight": np.ones((3, 3), np.float32), "num_updates": np.array(7)}
    raw_alone = {name: value for name, value in mixed.items() if not name.startswith("ema_")}
    expected = read_in(values)[1]
    for chosen, weights, offset, note in (
        (mixed, "ema", 0, "averaged weights (ema_denoiser.)"),
        (mixed, "raw", 1, "last weights (denoiser.)"),
        (raw_alone, "ema", 1, "last weights (denoiser.)"),
    ):
        own, notes = convert.own_tensors(chosen, weights=weights)
        passed = ["no weights, passed over: num_updates", "of other modules, passed over: diffusion_trainer (1 tensors)"]
        assert notes[0] == note and sorted(notes[1:]) == passed
        params = read_in(own)[1]
        jax.tree.map(lambda a, b, offset=offset: np.testing.assert_array_equal(a, b + np.float32(offset)), params, expected)


def test_what_a_lightning_checkpoint_lacks_or_adds_is_no_secret():
    values = tensors()
    average = {f"ema_denoiser.{name}": value for name, value in values.items()}
    with pytest.raises(UserError, match="averaged weights alone: leave out --weights=raw"):
        convert.own_tensors(average, weights="raw")
    own, _ = convert.own_tensors(average | {"surprise.weight": values[W2]}, weights="ema")
    with pytest.raises(UserError, match=r"1 tensors do not fit the network: surprise.weight: extra"):
        read_in(own)


def test_the_side_of_the_images_is_assumed_aloud(tmp_path, capsys):
    file = write(tmp_path / "w.safetensors", tensors("ddt"))
    convert.convert(checkpoint=file, out=tmp_path / "out")
    assert "images 64 x 64 (16 patches: the tensors do not tell, --image_size does)" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "out")[0].config == dataclasses.replace(MODELS["ddt"], image_size=(64, 64))


def test_half_precision_becomes_float32():
    values = {name: value.astype(np.float16) for name, value in tensors().items()}
    _, params = read_in(values)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def _without(values, name):
    return {key: value for key, value in values.items() if key != name}


def _renamed(values, name):
    return {key + "x" * (key == name): value for key, value in values.items()}


def _changed(values, name, change):
    return {**values, name: change(values[name])}


W2, EMBED, NORM = "blocks.1.mlp.w2.weight", "s_embedder.proj.weight", "blocks.0.attn.q_norm.weight"
MISTAKES = {
    "missing": (lambda v: _without(v, W2), rf"1 tensors do not fit .*{W2}: missing"),
    "renamed": (lambda v: _renamed(v, W2), rf"2 tensors do not fit .*{W2}: missing; {W2}x: extra"),
    "transposed": (lambda v: _changed(v, W2, np.transpose), rf"{W2}: \[85, 32\] instead of \[32, 85\]"),
    "extra": (lambda v: v | {"blocks.0.gamma": v[W2]}, r"blocks.0.gamma: extra"),
    "other width": (lambda v: _changed(v, EMBED, lambda a: a[:16]), r"tensors do not fit .* and \d+ more"),
    "no embedding": (lambda v: _without(v, EMBED), r"s_embedder.proj.weight, which tells the sizes, is missing"),
    "latent": (lambda v: _changed(v, EMBED, lambda a: a[:, :16]), r"16 columns, not 3 P\^2"),
    "odd heads": (lambda v: _changed(v, NORM, lambda a: a[:5]), "5 entries, which do not divide"),
    "empty heads": (lambda v: _changed(v, NORM, lambda a: a[:0]), r"which tells the sizes, has shape \[0\]"),
    "odd names": (lambda v: v | {"blocks.x.param_generator1.y": v[W2]}, r"blocks.x.param_generator1.y: extra"),
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
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=(8,))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_files_and_sizes_are_refused(tmp_path):
    file = write(tmp_path / "w.safetensors", tensors())
    with pytest.raises(UserError, match=r"x_embedder.proj.weight, which tells the sizes, is missing: is --from right"):
        convert.convert("ddt", checkpoint=file, out=tmp_path / "out", image_size=(8,))
    with pytest.raises(UserError, match=r"not a multiple of model.patch_size=4"):
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=(10,))
    with pytest.raises(UserError, match=r"not recognised: it has none of local_decoder.* first names are a$"):
        convert.convert(checkpoint=write(tmp_path / "a.safetensors", {"a": np.ones(3)}), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"is a directory: name a file to read, or --to"):
        convert.convert(checkpoint=tmp_path, out=tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=(8,))


def test_a_malicious_pickle_is_refused_unexecuted(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    file = tmp_path / "w.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(UserError, match=r"w\.ckpt"):
        convert.convert("pixnerd", checkpoint=file, out=tmp_path / "out", image_size=(8,))
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint of PixNerd's weights; nobody may write there."""
    folder = tmp_path_factory.mktemp("converted")
    file = write(folder / "w.safetensors", tensors())
    argv = ["convert", f"--checkpoint={file}", f"--out={folder / 'run'}", "--dtype=float32", "--image_size=8,16"]
    assert __main__.main(argv) == 0
    assert checkpoint.load(folder / "run")[0].config == dataclasses.replace(
        MODELS["pixnerd"], dtype="float32", image_size=(8, 16)
    )
    return folder / "run"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--to=dip-pytorch"],
            "cannot become dip-pytorch: these are pixnerd's weights, not dip's: use --to=safetensors or pix",
        ),
        (["--to=pixnerd-pytorch", "--weights=raw"], "holds no item 'state', only"),
        (["--to=pixnerd-pytorch", "--dtype=float32"], "--dtype cannot stand beside --to=pixnerd-pytorch"),
        (["--to=safetensors", "--from=dip", "--image_size=8"], "--from, --image_size cannot stand beside --to"),
        (["--image_size=8,8,8"], "--image_size=8,8,8 must be one or two numbers"),
        (["--image_size=-8"], "--image_size=-8 must be one or two numbers"),
        ([], "is a directory: name a file to read, or --to"),
        (["--to=safetensors", "--out=w.pth"], "--out=w.pth must end in .safetensors, which is what is written"),
        (["--to=pixnerd-pytorch", "--out=w.txt"], "--out=w.txt must end in .pth or .pt or .ckpt, which is what is written"),
        (["--to=pixnerd-pytorch", "--out=w"], "--out=w must end in .pth or .pt or .ckpt"),
        (["--to=pytorch"], "flag --to=pytorch: value should be one of"),
    ],
)
def test_flags_that_contradict_are_one_line_and_write_nothing(converted, tmp_path, capsys, flags, message):
    suffix = next((flag.removeprefix("--to=") for flag in flags if flag.startswith("--to=")), "")
    out = tmp_path / {"": "w", "safetensors": "w.safetensors"}.get(suffix, "w.pth")
    assert __main__.main(["convert", f"--checkpoint={converted}", f"--out={out}", *flags]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_averaged_and_last_weights_of_a_run_are_written_as_asked(tmp_path):
    average = tensors()
    last = {name: value + 1 for name, value in average.items()}
    (model, ema), (_, params) = read_in(average), read_in(last)
    trained = state.TrainState(jnp.int32(3), *jax.tree.map(jnp.asarray, (params, {}, (ema,))))
    run = checkpoint.Checkpoints(tmp_path / "run", config.Checkpoint())
    run.save(3, trained, checkpoint.Record(config.Config(model=model), {}))
    run.close()
    for weights, values, where in (("ema", average, "run"), ("raw", last, "run/checkpoints/3")):
        file = convert.export("pixnerd-pytorch", checkpoint=tmp_path / where, out=tmp_path / weights, weights=weights)
        back = torch_file.read_tensors(file)
        assert {name: tensor.tobytes() for name, tensor in back.items()} == {n: v.tobytes() for n, v in values.items()}


def test_an_existing_file_is_never_overwritten(converted, tmp_path):
    for name in ("w.pth", "w.pth.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} exists already"):
            convert.export("pixnerd-pytorch", checkpoint=converted, out=tmp_path / "w.pth")
        assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head": "mlp"}, r"no published network has the head 'mlp', only unet \(dip\), coord_mlp \(pixnerd\), none \(ddt\)"),
        ({"placement": "hybrid"}, "dip is another network: model.placement is 'hybrid' here, 'post_hoc' there$"),
        ({"prediction": "x", "head_pool": "avg"}, "model.prediction is 'x' here, 'v' there; model.head_pool is 'avg' here"),
        ({"head_depth": 3}, "model.head_depth is 3 here, 4 there$"),
        ({"patch_size": 8, "head_depth": None}, "model.head_depth is 3 here, 4 there$"),
        ({"head_width": 32}, "model.head_width is 32 here, 64 there$"),
        ({"position": "rope+sincos"}, "model.position is 'rope.sincos' here"),
    ],
)
def test_a_network_that_nobody_published_is_named_by_what_differs(fields, message):
    with pytest.raises(UserError, match=message):
        torch_names.network_of(dataclasses.replace(MODELS["dip"], **fields))


@pytest.mark.parametrize(
    "patch_size, depth, width, count", [(16, 26, 1152, 631_989_411), (32, 26, 1152, 634_643_619), (16, 22, 1024, 425_424_387)]
)
def test_the_published_sizes_have_the_published_counts(patch_size, depth, width, count):
    sizes = {"patch_size": patch_size, "depth": depth, "width": width, "num_heads": 16}
    shapes = torch_names.shapes(config.Model(**sizes, **NETWORKS["dip"].fields))
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_the_head_s_own_defaults_are_the_official_ones():
    assert torch_names.network_of(dataclasses.replace(MODELS["dip"], head_width=None, head_depth=None)) == "dip"
