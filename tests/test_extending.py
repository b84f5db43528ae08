"""README's "Extending it": each row is added as it says, and whatever it names picks the row up."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import readme_rows
from faults import harness
from PIL import Image
from places import ROOT, SUPPORT

import dip_jax
from dip_jax import __main__
from dip_jax.config import Mesh
from dip_jax.data import sources
from dip_jax.data.sources.files import open_folder
from dip_jax.errors import Exit, UserError
from dip_jax.jobs import info, train
from dip_jax.models import cost, detailers, placement


@pytest.fixture
def tables():
    """The tables of heads, which are themselves again afterwards."""
    yield
    detailers.HEADS.pop("blur", None)
    cost.HEAD_PRODUCTS.pop("blur", None)


def test_the_head_of_the_readme_trains_samples_and_has_a_cost(tables, dataset, tmp_path):
    readme_rows.add_head()
    config = harness.tiny_config(dataset, model__head="blur", train__steps=1)
    train.train(config, workdir=tmp_path / "run")
    model, params = dip_jax.load(tmp_path / "run")
    assert model.config.head == "blur" and "colour" in params["head"]
    assert dip_jax.sample(model, params, labels=[0, 1], seed=0, steps=2).shape == (2, 16, 16, 3)
    x, y = jax.random.normal(jax.random.key(0), (1, 16, 16, 3)), np.zeros(1, np.int32)
    drawn = jax.jit(model.apply)(params, x, np.zeros(1, np.float32), y)
    np.testing.assert_allclose(drawn[0, :8, :8], np.broadcast_to(drawn[0, :1, :1], (8, 8, 3)), rtol=1e-6)
    described = info.describe(config, mesh=config.mesh)
    assert described["flops_per_image"]["head"] == 2 * 4 * 16 * 3
    assert described["parameters"]["head"] == 3 * 16 + 3
    assert json.dumps(described)


def test_a_head_without_a_cost_is_one_line_that_names_the_table(tables, dataset):
    readme_rows.add_head(costed=False)
    with pytest.raises(UserError, match=r"model.head='blur' has no cost: .*HEAD_PRODUCTS of dip_jax/models/cost.py") as told:
        info.describe(harness.tiny_config(dataset, model__head="blur"), mesh=Mesh(data=8))
    assert "\n" not in str(told.value)


def test_a_placement_is_a_function_and_its_row(monkeypatch, dataset, tmp_path):
    monkeypatch.setitem(placement.PLACEMENTS, "doubled", readme_rows.doubled)
    config = harness.tiny_config(dataset, model__head="mlp", model__placement="doubled", train__steps=1)
    train.train(config, workdir=tmp_path / "run")
    model, params = dip_jax.load(tmp_path / "run")
    assert dip_jax.sample(model, params, labels=[0], seed=0, steps=2).shape == (1, 16, 16, 3)
    assert info.describe(config, mesh=config.mesh)["flops_per_image"]["head"] > 0


def test_a_source_is_a_function_that_gives_splits_and_its_row(monkeypatch, tmp_path):
    def open_colours(argument, root, image_size, scratch):
        return {"train": open_folder("", str(pictures), image_size, scratch)["train"]} if argument == "two" else {}

    pictures = tmp_path / "pictures"
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (pictures / name).mkdir(parents=True)
        Image.new("RGB", (20, 16), colour).save(pictures / name / "1.png")
    monkeypatch.setitem(sources.SOURCES, "colours", sources.Source(open_colours, encoding="raw", image_size=16))
    command = ["prepare", "--source=colours:two", f"--out={tmp_path / 'set'}"]
    assert __main__.main(command) == Exit.DONE
    made = dip_jax.open_dataset(tmp_path / "set")
    assert sorted(made[i]["image"][0, 0].tolist() for i in range(2)) == [[0, 0, 255], [255, 0, 0]]


def test_an_experiment_is_a_file_that_starts_from_defaults(tmp_path, dataset):
    file = tmp_path / "mine.py"
    file.write_text(
        '"""Mine."""\n\nfrom dip_jax.config import defaults\n\n\ndef get_config():\n    config = defaults()\n'
        "    config.model.update(size='tiny', depth=1, width=16, num_heads=2, patch_size=8, image_size=(16, 16), head='none')\n"
        f"    config.data.update(path={str(dataset)!r}, batch_size=8)\n"
        "    config.model.num_classes = 3\n    config.train.update(steps=1, sample_every=0)\n    return config\n"
    )
    assert __main__.main(["info", f"--config={file}"]) == Exit.DONE
    assert __main__.main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == Exit.DONE
    out = tmp_path / "out.npz"
    command = ["sample", f"--workdir={tmp_path / 'run'}", "--num_samples=3", "--steps=2", f"--out={out}"]
    assert __main__.main(command) == Exit.DONE and out.exists()


@pytest.mark.parametrize(
    "options", [["--collect-only", "-q"], pytest.param(["-q"], marks=pytest.mark.slow)], ids=["collected", "run"]
)
def test_the_contracts_pick_the_head_of_the_readme_up(options):
    """All files that loop over the tables are collected with one head and one placement more, and hold for them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-p",
        "readme_rows",
        "-p",
        "no:cacheprovider",
        "-k",
        "blur or doubled",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    files = ["tests/models", "tests/jobs/test_info.py"]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for contract in (
        ("own_pixels_alone", "first_prediction", "same_bits", "traced_products") if "--collect-only" in options else ()
    ):
        assert re.search(rf"{contract}.*blur", done.stdout), contract
