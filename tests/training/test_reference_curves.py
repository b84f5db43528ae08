"""The first losses of docs/reference_curves.md: the crops, their order, the first weights, the noise and the updates."""

import runpy

import jax
import numpy as np
import pytest
from places import ROOT

from benchmarks.paper import tables
from dip_jax import config
from dip_jax.data import order, prepared
from dip_jax.jobs import prepare
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.training import optim, state, step

ROWS = tables.read(ROOT / "docs" / "figures" / "reference_curves.csv")
STEPS = 20


def settings(curve: str, seed: int) -> config.Config:
    made = runpy.run_path(str(ROOT / "configs" / "reference.py"))["get_config"](curve)
    made.train.seed = seed
    return config.from_config_dict(made)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "photo_crops"
    prepare.prepare("photo_crops", out=out, image_size=64)
    return prepared.open_dataset(out / "train")


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row["curve"] == 64], ids=lambda row: f"seed{row['seed']}")
def test_the_first_losses_are_those_of_the_page(row, dataset):
    run = settings(str(row["curve"]), row["seed"])
    model = dip.from_config(run.model)
    optimizer = optim.make_optimizer(run.optim, total_steps=run.train.steps)
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    losses = []
    with jax.set_mesh(mesh):
        places = state.state_shardings(model, optimizer, mesh)
        train_step = step.compile_train_step(model, optimizer, places, mesh, objective=run.flow, optim=run.optim)
        now = state.init_sharded(model, optimizer, run.train.seed, places)
        key = jax.random.fold_in(jax.random.key(run.train.seed), 1)
        for k in range(STEPS):
            drawn = order.batch_indices(len(dataset), batch_size=run.data.batch_size, seed=run.train.seed, step=k)
            records = [dataset[i] for i in drawn.tolist()]
            batch = {name: np.stack([record[name] for record in records]) for name in ("image", "label")}
            now, metrics = train_step(now, batch, key)
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, [row[f"step_{k + 1}"] for k in range(STEPS)], rtol=1e-3)
