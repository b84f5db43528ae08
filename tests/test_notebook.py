"""The notebook: it runs from top to bottom on a checkpoint, and what is committed shows its outputs and stays small.

To refresh the outputs: `jupyter execute --inplace notebooks/dip_colab.ipynb`.
"""

import os
import re

import jax
import nbclient
import nbformat
import pytest
from places import ROOT
from small_models import randomise

from dip_jax import config
from dip_jax.checkpoints import checkpoint
from dip_jax.models import dip

NOTEBOOK = ROOT / "notebooks" / "dip_colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_with_its_outputs_and_small(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 2_000_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [o for cell in code for o in cell.outputs if "image/jpeg" in o.get("data", {})]
    assert len(pictures) >= 5
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert all(cell.execution_count for cell in code)


def test_it_names_no_machine(notebook):
    text = nbformat.writes(nbformat.from_dict({**notebook, "cells": [_without_pictures(cell) for cell in notebook.cells]}))
    assert not re.search(r"/(tmp|work|home|root|opt)/", text)


def _without_pictures(cell):
    cell = nbformat.from_dict(dict(cell))
    if cell.cell_type == "code":
        cell.outputs = [o for o in cell.outputs if "image/jpeg" not in o.get("data", {})]
    return cell


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["post_hoc", "residual", "intermediate"])
def test_it_runs_from_top_to_bottom(notebook, tmp_path, placement):
    """With a tiny model of every part that the notebook looks at; only sizes and counts differ from the released one's."""
    fields = {"size": "tiny", "depth": 1, "width": 16, "num_heads": 1, "patch_size": 8, "image_size": (16, 16)}
    fields |= {"num_classes": 3, "head_width": 4, "dtype": "float32", "placement": placement, "inject_after": 1}
    settings = config.Config(model=config.Model(**fields), sample=config.Sample(steps=5, guidance=2.0))
    params = randomise(jax.jit(dip.from_config(settings.model).init)(jax.random.key(0)))
    checkpoint.write_weights(tmp_path / "run", params, config=settings)
    environment = os.environ | {
        "DIP_CHECKPOINT": str(tmp_path / "run"),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("DIP_TEST_CACHE", "/tmp/dip_jax_test_cache") + "_notebook",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=environment)
    text = "".join(o.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs)
    assert f"head 'unet', {placement}: 0.0" in text and "'steps': 5, 'guidance': 2.0" in text
    (change,) = re.findall(r"the pixels change the image by (\S+) levels", text)
    assert float(change) > 0  # wherever the head sits
    assert re.search(r"samples +N 60 +fid_lite0", text)
