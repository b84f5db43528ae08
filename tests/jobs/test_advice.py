"""Whatever a message tells people to type is typed here, as the message says it, and works."""

import dataclasses
import random
import re
import shlex
import shutil
import tomllib
import zipfile

import pytest
from advice import advice
from faults import harness
from PIL import Image
from places import ROOT, TESTS
from preparing import make_folder
from published import tensors, write
from source_files import generate, write_parquet, write_webdataset

import dip_jax
from dip_jax import __main__, config
from dip_jax.data import shards
from dip_jax.errors import UserError
from dip_jax.jobs import info, train
from dip_jax.runtime import sharding, trackers
from dip_jax.training import repa

CONFIG = """
from dip_jax.config import defaults


def get_config():
    config = defaults()
    config.model.update(size='tiny', depth=1, width=16, num_heads=2, patch_size=8, image_size=(16, 16))
    config.model.update(head='none', num_classes=0)
    config.data.update(path={path!r}, batch_size=8, num_threads=1)
    config.train.update(steps=1, sample_every=0)
    config.sample.update(steps=2, batch_size=8)
    return config
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of photographs, a dataset of them, a config for it and a checkpoint: nobody may write there."""
    root = tmp_path_factory.mktemp("world")
    make_folder(root / "photos", per_class=3)
    assert (
        __main__.main(["prepare", "--source=folder", f"--from={root / 'photos'}", "--image_size=16", f"--out={root / 'set'}"])
        == 0
    )
    (root / "tiny.py").write_text(CONFIG.format(path=str(root / "set")))
    write(root / "w.safetensors", tensors("pixnerd"))
    assert (
        __main__.main(["convert", f"--checkpoint={root / 'w.safetensors'}", "--image_size=8,16", f"--out={root / 'pixnerd'}"])
        == 0
    )
    return root


@pytest.fixture
def refused(capsys):
    """What a command that ends with 2 says, in its last line."""

    def run(*argv, code=2) -> str:
        capsys.readouterr()
        assert __main__.main([str(word) for word in argv]) == code
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def done(*argv) -> None:
    assert __main__.main([str(word) for word in argv]) == 0, argv


def flags_in(line: str) -> list[str]:
    return re.findall(r"--[a-z_.]+=[^\s,;]+", line.rpartition(": ")[2])


def command_in(line: str, **filled) -> list[str]:
    """The command that a message prints, with what it leaves open filled in."""
    words = shlex.split(re.search(r"python -m dip_jax ([^`]*)", line).group(1))
    return [re.sub(r"=(N|DIR|ANOTHER_DIR)$", lambda found: f"={filled[found.group(1)]}", word) for word in words]


@pytest.mark.slow
def test_the_classes_of_a_dataset(world, refused, tmp_path):
    ask = ["train", f"--config={world / 'tiny.py'}", f"--workdir={tmp_path / 'run'}"]
    (flag,) = flags_in(refused(*ask, "--config.model.num_classes=7"))
    done(*ask, flag)
    done(*ask[:-1], f"--workdir={tmp_path / 'other'}", "--config.model.num_classes=0")


@pytest.mark.slow
@pytest.mark.parametrize("way", [0, 1])
def test_a_dataset_of_another_size(world, refused, tmp_path, way):
    ask = ["train", f"--config={world / 'tiny.py'}", f"--workdir={tmp_path / 'run'}", "--config.model.image_size=(32,32)"]
    flag = flags_in(refused(*ask))[way]
    done("prepare", "--source=folder", f"--from={world / 'photos'}", flag, f"--out={tmp_path / 'set'}")
    done(*ask, f"--config.data.path={tmp_path / 'set'}")


@pytest.mark.slow
def test_no_dataset_at_all(world, refused, tmp_path):
    ask = ["train", f"--config={world / 'tiny.py'}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={tmp_path / 'set'}"]
    done(*command_in(refused(*ask), DIR=world / "photos", N=16))
    done(*ask)


def test_a_folder_without_classes_and_the_table_it_wants(world, refused, tmp_path):
    shutil.copytree(world / "photos" / "ants", tmp_path / "flat")
    ask = ["prepare", f"--from={tmp_path / 'flat'}", "--image_size=16", f"--out={tmp_path / 'set'}"]
    line = refused(*ask, "--source=folder")
    rows = "\n".join(f"{path.name},ant" for path in sorted((tmp_path / "flat").iterdir()))
    assert "--from=FILE.csv" in refused(*ask, "--source=csv")
    (tmp_path / "flat" / "table.csv").write_text(f"file,label\n{rows}\n")
    flags = [flag.replace("FILE.csv", str(tmp_path / "flat" / "table.csv")).rstrip(")") for flag in flags_in(line)]
    assert len(flags) == 2
    done("prepare", *flags, *ask[2:])


@pytest.mark.parametrize("kind", ["of several sizes", "in folders", "stored as originals"])
def test_a_reference_that_is_to_be_cropped(world, refused, tmp_path, kind):
    place, samples = tmp_path / "pictures", f"--samples={world / 'set'}"
    if kind == "stored as originals":
        done("prepare", "--source=folder", f"--from={world / 'photos'}", "--encoding=original", f"--out={place}")
        line = refused("evaluate", f"--samples={place}", f"--reference={world / 'set'}", "--cache=")
        command = ["prepare", "--source=folder", f"--from={world / 'photos'}", *flags_in(line.replace("=N", "=16"))]
        command.append(f"--out={tmp_path / 'crops'}")
    elif kind == "in folders":
        shutil.copytree(world / "photos", place)
        line = refused("evaluate", samples, f"--reference={place}", "--cache=")
        command = command_in(line, N=16, ANOTHER_DIR=tmp_path / "crops")
    else:
        place.mkdir()
        for i in range(6):
            Image.new("RGB", (20 + i, 20), (40 * i, 0, 0)).save(place / f"{i}.png")
        line = refused("evaluate", samples, f"--reference={place}", "--cache=")
        assert "move them into a sub-folder" in line
        (place / "all").mkdir()
        for path in place.glob("*.png"):
            path.rename(place / "all" / path.name)
        command = command_in(line, N=16, ANOTHER_DIR=tmp_path / "crops")
    done(*command)
    assert dip_jax.open_dataset(tmp_path / "crops")[0]["image"].shape == (16, 16, 3)


@pytest.mark.parametrize("way", [0, 1])
def test_crops_without_a_side(world, refused, tmp_path, way):
    ask = ["prepare", "--source=folder", f"--from={world / 'photos'}", f"--out={tmp_path / 'set'}"]
    done(*ask, flags_in(refused(*ask).replace("=N", "=16"))[way])


def test_a_quality_without_jpeg(world, refused, tmp_path):
    ask = ["prepare", "--source=folder", f"--from={world / 'photos'}", f"--out={tmp_path / 'set'}", "--image_size=16"]
    done(*ask, "--quality=60", *flags_in(refused(*ask, "--quality=60")))
    assert shards.read_info(tmp_path / "set").encoding == "jpeg"


def test_a_parquet_with_two_labels(refused, tmp_path):
    import pyarrow
    from pyarrow import parquet

    folder = write_parquet(generate(6), tmp_path / "hub")
    for path in folder.iterdir():
        table = parquet.read_table(path).rename_columns(["image", "fine"])
        parquet.write_table(table.append_column("coarse", pyarrow.array([0] * len(table))), path)
    ask = ["prepare", "--source=parquet", f"--from={folder}", "--image_size=16", f"--out={tmp_path / 'set'}"]
    done(*ask, *flags_in(refused(*ask).replace("COLUMN", "fine").replace(" by --", ": --")))


def test_tars_of_another_kind(refused, tmp_path):
    folder = write_webdataset(generate(6), tmp_path / "wds")
    (tar, _) = sorted(folder.iterdir())
    ask = ["prepare", "--source=imagenet_tar", f"--from={tar}", "--image_size=16", f"--out={tmp_path / 'set'}"]
    done(*ask, *flags_in(refused(*ask).replace(" --source", ": --source")))


def test_an_encrypted_zip_is_unpacked_and_read(world, refused, tmp_path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", world / "photos")
    data = bytearray((tmp_path / "photos.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the directory says of one member that it is
    (tmp_path / "locked.zip").write_bytes(data)
    ask = ["prepare", f"--from={tmp_path / 'locked.zip'}", "--source=zip", "--image_size=16", f"--out={tmp_path / 'set'}"]
    line = refused(*ask)
    zipfile.ZipFile(tmp_path / "photos.zip").extractall(tmp_path / "unpacked")
    done("prepare", f"--from={tmp_path / 'unpacked'}", re.search(r"--source=\w+$", line).group(), *ask[3:])


def test_more_bad_images_than_allowed(world, refused, tmp_path):
    shutil.copytree(world / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "ants" / "bad.png").write_bytes(b"no image")
    ask = ["prepare", "--source=folder", f"--from={tmp_path / 'photos'}", "--image_size=16", f"--out={tmp_path / 'set'}"]
    assert "accept the loss by a higher --max_rejected" in refused(*ask, code=3)
    done(*ask, "--max_rejected=1")


def test_what_a_later_rotation_needs(world, refused, tmp_path):
    ask = ["prepare", "--source=folder", f"--from={world / 'photos'}", "--exif=rotate", f"--out={tmp_path / 'set'}"]
    assert "choose one" in refused(*ask, "--encoding=original")
    done(*ask, "--image_size=16")


def test_an_output_that_is_there(world, refused, tmp_path):
    out = tmp_path / "w.pth"
    ask = ["convert", "--to=pixnerd-pytorch", f"--checkpoint={world / 'pixnerd'}", f"--out={out}"]
    done(*ask)
    assert refused(*ask).endswith("choose another --out")
    done(*ask[:-1], f"--out={tmp_path / 'v.pth'}")


@pytest.mark.parametrize("way", [0, 1])
def test_the_weights_of_another_network(world, refused, tmp_path, way):
    ask = ["convert", f"--checkpoint={world / 'pixnerd'}"]
    line = refused(*ask, "--to=dip-pytorch", f"--out={tmp_path / 'w.pth'}")
    target = re.search(r"use --to=(\S+) or (\S+)$", line).groups()[way]
    done(*ask, f"--to={target}", f"--out={tmp_path / ('w.safetensors', 'w.pth')[way]}")


@pytest.mark.slow
def test_a_checkpoint_for_a_file_and_a_file_for_a_checkpoint(world, refused, tmp_path):
    line = refused("convert", f"--checkpoint={world / 'pixnerd'}", f"--out={tmp_path / 'run'}")
    done(
        "convert",
        f"--checkpoint={world / 'pixnerd'}",
        *flags_in(line.replace("...", "safetensors")),
        f"--out={tmp_path / 'w.safetensors'}",
    )
    line = refused("sample", f"--checkpoint={tmp_path / 'w.safetensors'}", f"--out={tmp_path / 'a.png'}")
    done(*command_in(line), f"--checkpoint={tmp_path / 'w.safetensors'}", "--image_size=8,16", f"--out={tmp_path / 'run'}")
    done("sample", f"--checkpoint={tmp_path / 'run'}", "--steps=2", "--num_samples=2", f"--out={tmp_path / 'a.png'}")


def test_averaged_weights_alone(world, refused, tmp_path):
    values = {f"ema_denoiser.{name}": value for name, value in tensors("pixnerd").items()}
    write(tmp_path / "w.safetensors", values)
    ask = ["convert", f"--checkpoint={tmp_path / 'w.safetensors'}", "--image_size=8,16", f"--out={tmp_path / 'run'}"]
    assert refused(*ask, "--weights=raw").endswith("leave out --weights=raw")
    done(*ask)


@pytest.mark.slow
def test_samples_begun_otherwise(world, refused, tmp_path):
    ask = ["sample", f"--checkpoint={world / 'pixnerd'}", "--steps=2", "--num_samples=3", f"--out={tmp_path / 'pictures'}"]
    done(*ask)
    assert "choose another name or move it away" in refused(*ask, "--seed=1")
    shutil.move(tmp_path / "pictures", tmp_path / "away")
    done(*ask, "--seed=1")
    done(*ask[:-1], f"--out={tmp_path / 'others'}")


def test_the_heads_and_the_batch_on_a_mesh():
    model = config.Model(size="tiny", depth=1, num_heads=2, width=16)

    def check(batch_size, **sizes):
        sharding.check_split({"data": 1, "fsdp": 1, "tensor": 1, **sizes}, model=model, batch_size=batch_size, accumulate=1)

    with pytest.raises(UserError, match="choose a divisor"):
        check(8, tensor=4)
    check(8, tensor=2)
    with pytest.raises(UserError, match="change one of them"):
        check(8, data=3)
    check(9, data=3)
    check(8, data=4)


@pytest.mark.slow
def test_a_record_that_cannot_be_read(tmp_path):
    damaged = harness.make_dataset(tmp_path / "set", bad=3)
    with pytest.raises(UserError, match=r"restore that shard, or set data.on_bad_record=replace to go on without") as told:
        train.train(harness.tiny_config(damaged, train__steps=6), workdir=tmp_path / "run")
    key, value = re.search(r"set ([a-z_.]+)=([a-z]+)", str(told.value)).groups()
    train.train(harness.tiny_config(damaged, train__steps=6, **{key.replace(".", "__"): value}), workdir=tmp_path / "other")
    assert harness.steps_of(tmp_path / "other")[-1] == 6


@pytest.mark.parametrize(
    ("sizes", "helps"),
    [
        ({"data": 3}, {"data": 8}),
        ({"data": 3}, {"data": -1}),
        ({"data": 1, "fsdp": 2}, {"data": 4, "fsdp": 2}),
        ({"fsdp": 3}, {"fsdp": 4}),
        ({"data": 2, "tensor": 3}, {"data": 2, "tensor": 4}),
    ],
    ids=str,
)
def test_a_mesh_of_another_number_of_devices(sizes, helps):
    """Eight of them, as everywhere in these tests."""
    with pytest.raises(UserError, match=r"^mesh\.\w+=\d.* devices but there are 8: ") as told:
        sharding.make_mesh(config.Mesh(**sizes))
    line = str(told.value)
    if found := re.search(r"mesh.data=(\d+), or -1, takes them all", line):
        assert helps["data"] in (int(found.group(1)), -1)
        assert sharding.make_mesh(config.Mesh(**{**sizes, "data": int(found.group(1))})).size == 8
    else:
        assert line.endswith("choose sizes that divide their number")
    assert sharding.make_mesh(config.Mesh(**helps)).size == 8


@pytest.mark.parametrize(("size", "line"), [(0, "mesh.fsdp=0 must be"), (-2, "mesh.fsdp=-2 must be")])
def test_a_mesh_axis_is_told_by_its_name(size, line):
    with pytest.raises(UserError, match=f"^{line} a number of devices from 1, or -1"):
        config.Mesh(fsdp=size)
    with pytest.raises(UserError, match=r"^mesh\.data and mesh.fsdp are -1: .*give the other a number"):
        config.Mesh(fsdp=-1)
    config.Mesh(data=1, fsdp=-1)


def test_a_machine_of_another_number_of_devices():
    with pytest.raises(UserError, match=r"change --mesh, or set one of config.mesh to -1"):
        info.fill(config.Mesh(data=3), devices=8)
    assert info.fill(config.Mesh(data=-1, fsdp=2), devices=8).data == 4


@pytest.mark.slow
def test_cudnn_on_a_cpu(world, refused, tmp_path):
    ask = ["train", f"--config={world / 'tiny.py'}", f"--workdir={tmp_path / 'run'}"]
    line = refused(*ask, "--config.model.attention=cudnn")
    done(*ask, f"--config.{re.search(r'set (model.attention=auto)$', line).group(1)}")


@pytest.mark.slow
def test_what_is_missing_altogether(world, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (flag,) = flags_in(refused("info"))
    done("info", flag)
    (flag,) = flags_in(refused("train", f"--config={world / 'tiny.py'}"))
    done("train", f"--config={world / 'tiny.py'}", flag)
    assert refused("info", "--config", "configs/demo.py", "stray").endswith("flags are written --name=value")


def test_no_head_to_place(refused, world):
    ask = ["info", f"--config={world / 'tiny.py'}", "--config.model.num_classes=3", "--config.model.placement=hybrid"]
    assert refused(*ask).endswith("model.head=none goes with post_hoc")
    done(*ask[:-1], "--config.model.placement=post_hoc")


def test_one_token_is_not_normalised_over():
    model = config.Model(size="tiny", depth=2, patch_size=16, image_size=(16, 16))
    options = config.Repa(weight=0.5, layer=2, spatial_norm=True)
    with pytest.raises(UserError, match=r"set repa\.spatial_norm=False$"):
        repa.align(options, model)
    assert repa.align(dataclasses.replace(options, spatial_norm=False), model)
    with pytest.raises(UserError, match=r"use 1\.\.2$"):
        repa.align(dataclasses.replace(options, layer=3, spatial_norm=False), model)


@pytest.mark.slow
def test_a_damaged_step_has_an_older_one(dataset, tmp_path, refused):
    train.train(harness.tiny_config(dataset, train__steps=4), workdir=tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    harness.truncate(next(path for path in harness.files_of(steps / "4") if "ema" in str(path)), random.Random(0))
    ask = ["sample", "--steps=2", "--num_samples=2", f"--out={tmp_path / 'a.png'}"]
    assert refused(*ask, f"--checkpoint={steps / '4'}").endswith("use another step of the same workdir")
    done(*ask, f"--checkpoint={steps / '2'}")


def test_packages_to_install_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = " ".join([(ROOT / "requirements.txt").read_text(), *(name for extra in extras.values() for name in extra)])
    for _, text in advice():
        for word in re.findall(r"pip install (?:-e )?['\"]?([\w.\[\]{}-]+)", text):
            extra = re.search(r"\[([\w-]+)\]", word)
            installed = (
                [kind.install for kind in trackers.TRACKERS.values()] if "train.tracker" in text or word == "{}" else [word]
            )
            names = (*re.findall(r"[\w-]+", known), "it", ".[{}]")
            assert (extra.group(1) in extras) if extra else set(installed) <= set(names), text
    for name in ("tpu", "gpu"):
        assert f"aot-{name}" in extras


HERE = "jobs/test_advice.py"


# What is said, by its beginning, and the test that follows it; everything else is followed above.
@pytest.mark.slow
def test_a_second_output_for_a_finished_model(world, refused, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train_it = ["train", f"--config={world / 'tiny.py'}", "--config.repa.weight=0"]
    done(*train_it, f"--workdir={run}")
    draw = ["sample", "--num_samples=2", "--internal_guidance=2", f"--out={tmp_path / 'x.png'}"]
    line = refused(*draw, f"--workdir={run}")
    flags = re.findall(r"--config\.[a-z.]+=\w+", line)
    assert len(flags) == 2
    line = refused(*train_it, *flags, f"--workdir={other}")
    assert "name it by --init_from" in line
    done(*train_it, *flags, f"--init_from={run}", f"--workdir={other}")
    done(*draw, f"--workdir={other}")
    done(*draw[:2], "--internal_guidance=1", draw[-1], f"--workdir={run}")


def test_what_a_second_output_needs():
    only = config.Train(only="internal")
    with pytest.raises(UserError, match=r"set model\.internal=True, or train\.only=all and sample\.internal_guidance=1"):
        config.Config(train=only, repa=config.Repa(weight=0.0))
    with pytest.raises(UserError, match=r"set repa\.weight=0"):
        config.Config(model=config.Model(internal=True), train=only, repa=config.Repa(weight=0.5))
    config.Config(model=config.Model(internal=True), train=only, repa=config.Repa(weight=0.0))
    config.Config(train=config.Train(only="all"), sample=config.Sample(internal_guidance=1.0))


@pytest.mark.slow
def test_which_run_to_tell_of(world, refused, tmp_path):
    assert "name that of a run, such as --workdir=runs/demo" in refused("status")
    assert "name the --workdir that train was given" in refused("status", f"--workdir={tmp_path}")
    done("train", f"--config={world / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    done("status", f"--workdir={tmp_path / 'run'}")


ELSEWHERE = {
    "pip install": HERE,
    "get one that has with pip install Pillow": "data/test_images.py",
    "--save_seconds says": "checkpoints/test_checkpoint.py",
    "choose another --workdir": "jobs/test_ways_out.py",
    "lower optim.learning_rate": "jobs/test_ways_out.py",
    "is every process started": "runtime/test_distributed.py",
    "if process 0 runs on another one": "runtime/test_distributed.py",
    "wait for it, or choose another --out": "jobs/test_prepare_kills.py",
    "use fewer --processes": "jobs/test_prepare_kills.py",
    "--exif=rotate turns": "jobs/test_prepare_as_it_is.py",
    "--source=tfds:imagenet2012": "jobs/test_prepare.py",
    "give another data_dir": "jobs/test_prepare.py",
    "--confirm draws it again": "jobs/test_sweep.py",
    "then {}, and rows of metrics.jsonl by train.log_every": "training/test_pace.py",
}
FOLLOWED = (
    "make a checkpoint of it with `python -m dip_jax convert`",
    "choose another --out",
    "is --from right",
    "set --config.model.num_classes={}, or 0",
    "prepare another with --image_size={}, or store originals",
    "prepare one with `python -m dip_jax prepare",
    "give the table itself, --from=FILE.csv",
    "say which is the label by --source=parquet:COLUMN",
    "for others --source=webdataset",
    "{} (or a table of them",
    "unpack it with its password, then --source=folder",
    "accept the loss by a higher --max_rejected",
    "name a file to read, or --to=...",
    "leave out --weights=raw",
    "use --to=safetensors or {}-pytorch",
    "change --mesh, or set one of config.mesh to -1",
    "leave it out, or use --encoding=jpeg",
    "say their side with --image_size=N, or use --encoding=original",
    "name a directory, such as --workdir=runs/demo",
    "set model.attention=auto",
    "prepare crops of them with --image_size=N",
    "python -m dip_jax prepare --source=folder --from={} --image_size=N",
    "model.head=none goes with post_hoc",
    "name a file, such as --config=configs/demo.py",
    "flags are written --name=value",
    "leave out what --help says goes with others",
    "set repa.spatial_norm=False",
    "restore that shard, or set data.on_bad_record=replace",
    "the tensors do not tell, --image_size does",
    "name that of a run, such as --workdir=runs/demo",
    "name the --workdir that train was given",
    "name it by --init_from",
    "leave it at 1, or train that output by train --init_from",
    "set model.internal=True, or train.only=all",
    "set repa.weight=0",
)


@pytest.mark.parametrize(("file", "text"), sorted(set(advice())), ids=lambda value: value[:40])
def test_every_advice_is_followed_by_a_test(file, text):
    known = any(text.startswith(begin) for begin in (*ELSEWHERE, *FOLLOWED))
    assert known, f"dip_jax/{file} tells people to type {text!r}: follow it in a test here, or name the file that does"


@pytest.mark.parametrize(("begin", "file"), ELSEWHERE.items(), ids=lambda value: value[:40])
def test_what_is_followed_elsewhere_is_still_said(begin, file):
    assert any(text.startswith(begin) for _, text in advice()), "nobody says this any more: take it from the table"
    assert (TESTS / file).exists()


def test_the_table_has_no_more_than_is_said():
    said = [text for _, text in advice()]
    assert not [begin for begin in FOLLOWED if not any(text.startswith(begin) for text in said)]
