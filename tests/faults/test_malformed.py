"""Inputs from strangers and slips of the hand: one clear line, the right exit code, nothing overwritten, nothing executed."""

import io
import json
import pathlib
import pickle
import shutil
import struct
import sys
import zipfile

import jax
import numpy as np
import pytest
from faults import harness
from places import ROOT

from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint, manifest
from dip_jax.errors import Exit
from dip_jax.models import dip
from dip_jax.runtime import storage

CONFIG = "--config=configs/demo.py"


class Bomb:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("/tmp/dip_jax_executed"),))


def npz(*, names=("arr_0.npy",), arrays=None, raw=None) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            content = io.BytesIO()
            if raw is None:
                np.save(content, arrays, allow_pickle=True)
            archive.writestr(name, raw if raw is not None else content.getvalue())
    return data.getvalue()


TRAIN = ["train", "--workdir={tmp}/w", CONFIG]
COMMANDS = {
    "no command": ["trian"],
    "train nothing": ["train"],
    "unknown flag": [*TRAIN, "--wrkdir=x"],
    "positional": [*TRAIN, "now"],
    "unknown section": [*TRAIN, "--config.optimm.learning_rate=1"],
    "unknown key": [*TRAIN, "--config.optim.learningrate=1"],
    "text for number": [*TRAIN, "--config.train.steps=many"],
    "negative steps": [*TRAIN, "--config.train.steps=-1"],
    "zero batch": [*TRAIN, "--config.data.batch_size=0"],
    "nan rate": [*TRAIN, "--config.optim.learning_rate=nan"],
    "negative rate": [*TRAIN, "--config.optim.learning_rate=-1"],
    "decay above one": [*TRAIN, "--config.optim.ema_decays=(1.5,)"],
    "unknown size": [*TRAIN, "--config.model.size=huge"],
    "unknown head": [*TRAIN, "--config.model.head=unett"],
    "unknown placement": [*TRAIN, "--config.model.placement=before"],
    "unknown dtype": [*TRAIN, "--config.model.dtype=float16"],
    "image not a multiple": [*TRAIN, "--config.model.image_size=(65,65)"],
    "heads do not divide": [*TRAIN, "--config.model.num_heads=7"],
    "two rests": [*TRAIN, "--config.mesh.fsdp=-1"],
    "accumulate": [*TRAIN, "--config.optim.accumulate=5"],
    "missing dataset": [*TRAIN, "--config.data.path={tmp}/none"],
    "dataset is a file": [*TRAIN, "--config.data.path={tmp}/bytes"],
    "dataset without content": [*TRAIN, "--config.data.path={tmp}/folder"],
    "no config file": ["train", "--workdir={tmp}/w", "--config={tmp}/none.py"],
    "config is a folder": ["train", "--workdir={tmp}/w", "--config={tmp}/folder"],
    "config is bytes": ["train", "--workdir={tmp}/w", "--config={tmp}/bytes"],
    "config has a slip": ["train", "--workdir={tmp}/w", "--config={tmp}/slip.py"],
    "config raises a ValueError": ["train", "--workdir={tmp}/w", "--config={tmp}/value_error.py"],
    "config raises": ["train", "--workdir={tmp}/w", "--config={tmp}/raises.py"],
    "config lacks get_config": ["train", "--workdir={tmp}/w", "--config={tmp}/empty.py"],
    "config returns a list": ["train", "--workdir={tmp}/w", "--config={tmp}/list.py"],
    "config returns rubbish": ["train", "--workdir={tmp}/w", "--config={tmp}/rubbish.py"],
    "workdir below a file": ["train", "--workdir={tmp}/bytes/w", CONFIG, "--config.data.path={tmp}/set"],
    "info on no mesh": ["info", CONFIG, "--mesh=data"],
    "info on odd mesh": ["info", CONFIG, "--mesh=rows:8"],
    "info nothing": ["info"],
    "sample nothing": ["sample", "--out={tmp}/o.png"],
    "sample nowhere": ["sample", "--workdir={tmp}/none", "--out={tmp}/o.png"],
    "sample a file": ["sample", "--workdir={tmp}/bytes", "--out={tmp}/o.png"],
    "sample an empty folder": ["sample", "--workdir={tmp}/folder", "--out={tmp}/o.png"],
    "sample to nowhere": ["sample", "--workdir={tmp}/run"],
    "sample into a file that is none": ["sample", "--workdir={tmp}/run", "--out={tmp}/bytes/o.png"],
    "sample no steps": ["sample", "--workdir={tmp}/run", "--out={tmp}/o.png", "--steps=0"],
    "sample odd solver": ["sample", "--workdir={tmp}/run", "--out={tmp}/o.png", "--solver=rk4"],
    "sample odd label": ["sample", "--workdir={tmp}/run", "--out={tmp}/o.png", "--labels=99"],
    "sample odd interval": ["sample", "--workdir={tmp}/run", "--out={tmp}/o.png", "--interval=1,0"],
    "sample negative seed": ["sample", "--workdir={tmp}/run", "--out={tmp}/o.png", "--seed=-1"],
    "evaluate nothing": ["evaluate"],
    "evaluate nowhere": ["evaluate", "--samples={tmp}/none.npz", "--reference={tmp}/good.npz"],
    "evaluate bytes": ["evaluate", "--samples={tmp}/bytes", "--reference={tmp}/good.npz"],
    "evaluate a pickle": ["evaluate", "--samples={tmp}/pickle.npz", "--reference={tmp}/good.npz"],
    "evaluate no arr_0": ["evaluate", "--samples={tmp}/named.npz", "--reference={tmp}/good.npz"],
    "evaluate floats": ["evaluate", "--samples={tmp}/floats.npz", "--reference={tmp}/good.npz"],
    "evaluate flat": ["evaluate", "--samples={tmp}/flat.npz", "--reference={tmp}/good.npz"],
    "evaluate rubbish inside": ["evaluate", "--samples={tmp}/rubbish.npz", "--reference={tmp}/good.npz"],
    "evaluate cut": ["evaluate", "--samples={tmp}/cut.npz", "--reference={tmp}/good.npz"],
    "evaluate a bomb": ["evaluate", "--samples={tmp}/bomb.npz", "--reference={tmp}/good.npz"],
    "evaluate against nothing": ["evaluate", "--samples={tmp}/good.npz"],
    "evaluate into an image": ["evaluate", "--samples={tmp}/good.npz", "--reference={tmp}/good.npz", "--out={tmp}/m.png"],
    "evaluate into a folder": ["evaluate", "--samples={tmp}/good.npz", "--reference={tmp}/good.npz", "--out={tmp}/folder"],
    "evaluate a folder of none": ["evaluate", "--samples={tmp}/folder", "--reference={tmp}/good.npz"],
    "evaluate a folder of damaged": ["evaluate", "--samples={tmp}/images/a", "--reference={tmp}/good.npz"],
    "evaluate a run as samples": ["evaluate", "--samples={tmp}/run", "--reference={tmp}/good.npz"],
    "train in a file": ["train", "--workdir={tmp}/bytes", CONFIG],
    "train in a zip": ["train", "--workdir={tmp}/w.zip", CONFIG],
    "sample as a JPEG": ["sample", "--workdir={tmp}/run", "--out={tmp}/x.JPG"],
    "sample onto a file": ["sample", "--workdir={tmp}/run", "--out={tmp}/bytes"],
    "prepare onto a file": ["prepare", "--source=folder", "--from={tmp}/images", "--image_size=16", "--out={tmp}/bytes"],
    "prepare a zip": ["prepare", "--source=folder", "--from={tmp}/images", "--image_size=16", "--out={tmp}/d.zip"],
    "convert onto a file": ["convert", "--from=ddt", "--checkpoint={tmp}/bytes", "--out={tmp}/bytes"],
    "convert nowhere": ["convert", "--from=pixnerd", "--checkpoint={tmp}/none.ckpt", "--out={tmp}/c"],
    "convert bytes": ["convert", "--from=pixnerd", "--checkpoint={tmp}/bytes", "--out={tmp}/c"],
    "convert a pickle": ["convert", "--from=ddt", "--checkpoint={tmp}/code.pth", "--out={tmp}/c"],
    "convert odd safetensors": ["convert", "--from=ddt", "--checkpoint={tmp}/odd.safetensors", "--out={tmp}/c"],
    "convert unknown bytes": ["convert", "--checkpoint={tmp}/bytes", "--out={tmp}/c"],
    "convert odd size": ["convert", "--from=dip", "--checkpoint={tmp}/bytes", "--image_size=big", "--out={tmp}/c"],
    "convert bytes out": ["convert", "--to=dip-pytorch", "--checkpoint={tmp}/bytes", "--out={tmp}/o.pth"],
    "convert to whom": ["convert", "--to=me", "--checkpoint={tmp}/run", "--out={tmp}/o.pth"],
    "convert from whom": ["convert", "--from=me", "--checkpoint={tmp}/bytes", "--out={tmp}/c"],
    "prepare nothing": ["prepare"],
    "prepare nowhere": ["prepare", "--source=folder", "--from={tmp}/none", "--image_size=16", "--out={tmp}/d"],
    "prepare odd source": ["prepare", "--source=fodler", "--from={tmp}/folder", "--image_size=16", "--out={tmp}/d"],
    "prepare empty": ["prepare", "--source=folder", "--from={tmp}/folder", "--image_size=16", "--out={tmp}/d"],
    "prepare no size": ["prepare", "--source=folder", "--from={tmp}/images", "--encoding=png", "--out={tmp}/d"],
    "prepare over another": ["prepare", "--source=folder", "--from={tmp}/images", "--image_size=16", "--out={tmp}/set"],
}

STEP_FAULTS = {
    "config is cut": lambda step: (step / "config/metadata").write_text('{"config": {'),
    "config is a list": lambda step: (step / "config/metadata").write_text("[1, 2]"),
    "config is binary": lambda step: (step / "config/metadata").write_bytes(bytes(range(256))),
    "config of another kind": lambda step: (step / "config/metadata").write_text('{"model": "DiP"}'),
    "config with unknown keys": lambda step: (step / "config/metadata").write_text(
        json.dumps(json.loads((step / "config/metadata").read_text()) | {"config": {"model": {"colour": 3}}})
    ),
    "no config": lambda step: shutil.rmtree(step / "config"),
    "no ema": lambda step: shutil.rmtree(step / "ema"),
    "ema is a file": lambda step: (shutil.rmtree(step / "ema"), (step / "ema").write_text("x")),
    "no tree": lambda step: (step / "ema/_METADATA").unlink(),
    "tree is rubbish": lambda step: (step / "ema/_METADATA").write_text("{}"),
    "tree is binary": lambda step: (step / "ema/_METADATA").write_bytes(bytes(range(256))),
    "no arrays": lambda step: (step / "ema/manifest.ocdbt").unlink(),
    "arrays are rubbish": lambda step: (step / "ema/manifest.ocdbt").write_bytes(b"\x00" * 100),
}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> pathlib.Path:
    tmp = tmp_path_factory.mktemp("inputs")
    for folder in ("folder", "images/a"):
        (tmp / folder).mkdir(parents=True)
    harness.make_dataset(tmp / "set")
    config = harness.tiny_config(tmp / "set")
    model = dip.from_config(config.model)
    checkpoint.write_weights(tmp / "run", model.init(jax.random.key(0)), config=config)
    (tmp / "bytes").write_bytes(bytes(range(256)))
    (tmp / "slip.py").write_text("def get_config(:\n")
    (tmp / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp / "value_error.py").write_text("def get_config():\n    return int('many')\n")
    (tmp / "empty.py").write_text("")
    (tmp / "list.py").write_text("def get_config():\n    return [1]\n")
    (tmp / "rubbish.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'model': 3})\n"
    )
    images = np.zeros((20, 16, 16, 3), np.uint8)
    (tmp / "images/a/x.png").write_bytes(b"no image")
    (tmp / "good.npz").write_bytes(npz(arrays=images))
    (tmp / "pickle.npz").write_bytes(npz(arrays=np.array([Bomb()], object)))
    (tmp / "named.npz").write_bytes(npz(names=("../../evil.npy",), arrays=images))
    (tmp / "floats.npz").write_bytes(npz(arrays=images.astype(np.float32)))
    (tmp / "flat.npz").write_bytes(npz(arrays=images.reshape(20, -1)))
    (tmp / "rubbish.npz").write_bytes(npz(raw=b"rubbish"))
    (tmp / "cut.npz").write_bytes(npz(arrays=images)[:5000])
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000, 256, 256, 3), }"
    (tmp / "bomb.npz").write_bytes(npz(raw=b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header))
    (tmp / "code.pth").write_bytes(pickle.dumps(Bomb()))
    (tmp / "odd.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return tmp


@pytest.fixture
def refused(tmp, capsys, monkeypatch):
    """Runs a command that must fail in one line, change no file and execute nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [])
    executed = pathlib.Path("/tmp/dip_jax_executed")
    executed.unlink(missing_ok=True)

    def run(argv):
        before = {path: path.read_bytes() for path in harness.files_of(tmp)}
        assert main([part.format(tmp=tmp) for part in argv]) == Exit.USER_ERROR
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("dip_jax")]
        assert len(lines) == 1 and len(lines[0]) < 900 and "Traceback" not in lines[0], errors
        assert "Traceback" not in errors
        assert {path: path.read_bytes() for path in before} == before, "a file was changed"
        assert not executed.exists(), "code of the input was executed"
        return lines[0]

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_slip_of_the_hand_is_one_line(refused, name):
    print(refused(COMMANDS[name]))


@pytest.mark.parametrize("name", STEP_FAULTS)
def test_a_strange_checkpoint_is_one_line(refused, tmp, tmp_path, name):
    """With a manifest that fits, as a stranger would make it: the fault must be caught by what reads the item."""
    shutil.copytree(tmp / "run", tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "0"
    STEP_FAULTS[name](step)
    manifest.write_manifest(storage.absolute(step))
    print(refused(["sample", f"--workdir={tmp_path / 'run'}", "--num_samples=2", f"--out={tmp_path}/o.png"]))


@pytest.mark.parametrize("line", ["0" * 64 + "  ../../../bytes", "0" * 64 + "  /etc/passwd", "rubbish", "\x00" * 50])
def test_a_strange_manifest_reads_nothing_outside(refused, tmp, tmp_path, line):
    shutil.copytree(tmp / "run", tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "0" / manifest.MANIFEST
    file.write_text(f"{file.read_text()}{line}\n")
    print(refused(["sample", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path}/o.png"]))
