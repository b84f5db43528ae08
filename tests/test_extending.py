"""README's "Extending it": each row is added as it says, and whatever it names picks the row up."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import readme_rows
import source_files
import toy_network
from faults import harness
from places import ROOT, SUPPORT

import dip_jax
from dip_jax import __main__
from dip_jax.config import Mesh
from dip_jax.data import sources
from dip_jax.errors import Exit, UserError
from dip_jax.jobs import info, train
from dip_jax.metrics import features
from dip_jax.models import cost, detailers, placement
from dip_jax.runtime import writers


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
    monkeypatch.setitem(sources.SOURCES, "lines", sources.Source(readme_rows.open_lines))
    file = readme_rows.write_lines(source_files.generate(12), tmp_path / "source")
    command = ["prepare", "--source=lines", f"--from={file}", "--image_size=16", f"--out={tmp_path / 'set'}"]
    assert __main__.main(command) == Exit.DONE
    made = dip_jax.open_dataset(tmp_path / "set")
    assert len(made) == 12 and list(made.classes) == sorted(source_files.CLASSES)
    config = harness.tiny_config(tmp_path / "set", train__steps=1)
    assert json.dumps(info.describe(config, mesh=config.mesh))
    train.train(config, workdir=tmp_path / "run")
    out = tmp_path / "out.npz"
    command = ["sample", f"--workdir={tmp_path / 'run'}", "--labels=Käse", "--num_samples=2", "--steps=2", f"--out={out}"]
    assert __main__.main(command) == Exit.DONE and np.load(out)["arr_1"].tolist() == [made.classes.index("Käse")] * 2


EXPERIMENT = """
from dip_jax.config import defaults


def get_config():
    config = defaults()
    config.model.update(size='tiny', depth=1, width=16, num_heads=2, patch_size=8, image_size=(16, 16), head='none')
    config.data.update(path={path!r}, batch_size=8)
    config.model.num_classes = 3
    config.train.update(steps=1, sample_every=0)
    return config
"""


def test_an_experiment_is_a_file_that_starts_from_defaults(tmp_path, dataset):
    file = tmp_path / "mine.py"
    file.write_text(f'"""Mine."""\n{EXPERIMENT.format(path=str(dataset))}')
    assert __main__.main(["info", f"--config={file}"]) == Exit.DONE
    assert __main__.main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == Exit.DONE
    out = tmp_path / "out.npz"
    command = ["sample", f"--workdir={tmp_path / 'run'}", "--num_samples=3", "--steps=2", f"--out={out}"]
    assert __main__.main(command) == Exit.DONE and out.exists()


@pytest.mark.parametrize("stated", [True, False])
def test_the_tests_pick_an_experiment_up_and_ask_for_its_docstring(tmp_path, stated):
    """In a copy of what its row names, as the file is to lie among ours."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("config", "support"):
        shutil.copytree(ROOT / "tests" / name, tmp_path / "tests" / name)
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    words = "Command: train --config=configs/mine.py\nHardware: a CPU\nExpected: nothing" if stated else "Mine."
    (tmp_path / "configs" / "mine.py").write_text(f'"""{words}"""\n{EXPERIMENT.format(path="")}')
    done = pytest_in(tmp_path, "-q", "-k", "mine", "tests/config/test_config.py")
    assert ("1 passed" in done.stdout) == stated, done.stdout + done.stderr
    assert stated or "mine.py does not state Command:" in done.stdout


def test_a_feature_network_is_a_function_and_its_row(monkeypatch, dataset, tmp_path):
    monkeypatch.setitem(features.NETWORKS, "toy", lambda weights: toy_network.network())
    judging = {"train__eval_every": 1, "eval__features": "toy", "eval__reference": str(dataset), "eval__num_samples": 8}
    config = harness.tiny_config(dataset, train__steps=1, **judging)
    assert json.dumps(info.describe(config, mesh=config.mesh))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train.train(config, workdir=tmp_path / "run")
    (row,) = writers.read_rows(tmp_path / "run" / "eval.jsonl")
    assert {"fid_toy", "is_toy", "precision_toy", "recall_toy"} <= row.keys()
    out = tmp_path / "metrics.json"
    command = ["evaluate", f"--samples={dataset}", f"--reference={dataset}", "--features=toy", f"--out={out}", "--cache="]
    assert __main__.main(command) == Exit.DONE
    (row,) = json.loads(out.read_text())["rows"]
    assert row["N"] == 48 and abs(row["fid_toy"]) < 1e-6 and row["precision_toy"] == 1


def test_a_checkpoint_whose_feature_network_is_gone_still_draws(monkeypatch, dataset, tmp_path):
    monkeypatch.setitem(features.NETWORKS, "toy", lambda weights: toy_network.network())
    train.train(harness.tiny_config(dataset, train__steps=1, eval__features="toy"), workdir=tmp_path / "run")
    monkeypatch.delitem(features.NETWORKS, "toy")
    model, params = dip_jax.load(tmp_path / "run")
    assert dip_jax.sample(model, params, labels=[0], seed=0, steps=2).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "key, wrong, message",
    [
        ("model.head", "unett", "unet, mlp, coord_mlp, attention, none; did you mean 'unet'"),
        ("model.placement", "posthoc", "post_hoc, intermediate, hybrid, residual; did you mean 'post_hoc'"),
        ("eval.features", "lite", "inception, lite0; did you mean 'lite0'"),
    ],
)
@pytest.mark.parametrize("command", ["info", "train"])
def test_a_name_that_is_no_row_is_one_line_with_the_rows(command, key, wrong, message, tmp_path, capsys, dataset):
    argv = [command, f"--config={ROOT / 'configs' / 'demo.py'}", f"--config.{key}={wrong}"]
    argv += ["--config.model.image_size=(16,16)", "--config.model.patch_size=8", "--config.model.num_classes=3"]
    argv += [f"--workdir={tmp_path / 'run'}", f"--config.data.path={dataset}"] if command == "train" else []
    assert __main__.main(argv) == Exit.USER_ERROR
    line = capsys.readouterr().err.strip().splitlines()[-1]  # of `train`, after what it runs on
    assert line.startswith(f"dip_jax {command}: ") and f"{key}={wrong!r} is unknown: it is one of " in line and message in line
    assert not (tmp_path / "run").exists()


def pytest_in(folder, *options, plugin=()):
    """A session of its own."""
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *plugin, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def files_named(what: str) -> list[str]:
    """The test files of a row of README's table."""
    return re.findall(r"`(tests/[\w/]+\.py)`", readme_rows.rows()[what][1])


# Of each row of README's table, the toy that is added to it (None: it is a file, see above).
TOYS = {"a head": "blur", "a placement": "doubled", "a dataset": "lines", "an experiment": None, "a feature network": "toy"}


def test_every_row_of_the_table_is_added_here_and_names_what_exists():
    assert set(readme_rows.rows()) == set(TOYS)
    for what, (write, picked_up_by) in readme_rows.rows().items():
        assert files_named(what) or picked_up_by == "the same", what
        for table, file in re.findall(r"`([A-Z_]+)` of `([\w/]+\.py)`", write):
            module = importlib.import_module("dip_jax." + file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
            assert isinstance(getattr(module, table), dict), table


@pytest.mark.parametrize(
    "options", [["--collect-only", "-q"], pytest.param(["-q"], marks=pytest.mark.slow)], ids=["collected", "run"]
)
def test_what_each_row_names_picks_its_toy_up(options):
    """All files that loop over the tables are collected with a row more of each, and hold for it."""
    toys = [toy for toy in TOYS.values() if toy]
    files = [file for what, toy in TOYS.items() if toy for file in files_named(what) if "/support/" not in file]
    collected = "--collect-only" in options
    files = [*dict.fromkeys([*files, "tests/models", "tests/jobs/test_info.py"])]
    done = pytest_in(ROOT, "-k", " or ".join(toys), *options, *files, plugin=("-p", "readme_rows"))
    assert done.returncode == 0, done.stdout + done.stderr
    if collected:
        for toy in toys:
            assert re.search(rf"\[.*{toy}", done.stdout), toy
        for contract in ("own_pixels_alone", "first_prediction", "same_bits", "traced_products"):
            assert re.search(rf"{contract}.*blur", done.stdout), contract
