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
from places import ROOT, SUPPORT

import dip_jax
from dip_jax.config import Mesh
from dip_jax.errors import UserError
from dip_jax.jobs import info, train
from dip_jax.models import cost, detailers


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


@pytest.mark.parametrize(
    "options", [["--collect-only", "-q"], pytest.param(["-q"], marks=pytest.mark.slow)], ids=["collected", "run"]
)
def test_the_contracts_pick_the_head_of_the_readme_up(options):
    """All files that loop over the tables are collected with a fifth head; those of its own tests run with it."""
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "readme_rows", "-p", "no:cacheprovider", "-k", "blur", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    files = ["tests/models", "tests/jobs/test_info.py"]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for contract in (
        ("own_pixels_alone", "first_prediction", "same_bits", "traced_products") if "--collect-only" in options else ()
    ):
        assert re.search(rf"{contract}.*blur", done.stdout), contract
