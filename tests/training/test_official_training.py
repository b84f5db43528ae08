"""Twenty steps of ours beside the authors' own (`benchmarks/official_training.py`): weights, images, noise, times alike."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case
from training_case import SETTINGS

from dip_jax import config, flow
from dip_jax.checkpoints import torch_names
from dip_jax.models import dinov2, dip
from dip_jax.training import repa, state, step
from dip_jax.training.optim import make_optimizer

OFFICIAL = {"in": "0.0", "hidden": "0.2", "out": "0.4"}  # the projector's layers


def projector_of(tensors) -> dict:
    return {ours: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]} for ours, name in OFFICIAL.items()}


def official(params, model) -> dict[str, np.ndarray]:
    """Parameters of ours under the official names, in their order."""
    tensors = dict(torch_names.to_tensors(repa.without_projector(params), model))
    if repa.PROJECTOR in params:
        for ours, name in OFFICIAL.items():
            layer = params[repa.PROJECTOR][ours]
            tensors |= {f"proj.{name}.weight": np.asarray(layer["kernel"]).T, f"proj.{name}.bias": np.asarray(layer["bias"])}
    return tensors


@pytest.fixture(scope="module")
def record():
    with np.load(case.ANSWERS) as answers:
        found = dict(answers)
    assert json.loads(str(found["settings"])) == SETTINGS
    return found


@functools.cache
def trained():
    """(model, start, end, losses of each step, the first step's batch as the network met it)."""
    shapes = json.loads(str(np.load(case.ANSWERS)["shapes"]))
    weights = {part: case.random_tensors(part, shapes[part]) for part in shapes}
    size = (SETTINGS["image_size"],) * 2
    model, params = torch_names.to_params(weights["denoiser"], source="dip", image_size=size, dtype="float32")
    encoder, frozen = dinov2.from_torch(weights["encoder"])
    network = dip.from_config(model)
    alignment = repa.align(config.Repa(weight=SETTINGS["weight"], layer=SETTINGS["layer"]), model, encoder)
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay")
    optim = config.Optim(**{name: SETTINGS[name] for name in names}, ema_decay=SETTINGS["ema_fast"])
    optimizer = make_optimizer(optim, total_steps=SETTINGS["steps"])
    start = repa.with_projector(params, projector_of(weights["proj"]))
    average = jax.tree.map(jnp.copy, params)
    current = state.TrainState(step=jnp.zeros((), jnp.int32), params=start, opt_state=optimizer.init(start), ema=average)
    objective, met = config.Flow(label_dropout=SETTINGS["label_dropout"]), []

    def drawn(numbers):
        def corrupt(key, x, y, *, flow: config.Flow, model: config.Model):
            """`flow.corrupt` with the recorded numbers in the place of random ones."""
            t = jax.nn.sigmoid(flow.t_mean + flow.t_std * numbers["normal"])
            y = jnp.where(numbers["uniform"] < flow.label_dropout, model.num_classes, y)
            return Corrupted(interpolate(x, numbers["noise"], t), t, y, velocity(x, numbers["noise"]))

        return corrupt

    Corrupted, interpolate, velocity = flow.Corrupted, flow.interpolate, flow.velocity
    fixed = {"model": network, "optimizer": optimizer, "objective": objective, "optim": optim, "alignment": alignment}

    @jax.jit
    def update(current, batch, numbers, frozen):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow, "corrupt", drawn(numbers))
            return step.train_step(current, batch, jax.random.key(0), frozen, **fixed)

    history = []
    for k in range(SETTINGS["steps"]):
        numbers = jax.tree.map(jnp.asarray, case.inputs(k))
        batch = {"image": numbers.pop("image"), "label": numbers.pop("label").astype(jnp.int32)}
        met.append(drawn(numbers)(None, step.to_float(batch["image"]), batch["label"], flow=objective, model=model))
        current, metrics = update(current, batch, numbers, frozen)
        history.append({name: float(metrics[name]) for name in ("loss", "loss_flow", "loss_repa")})
    return model, start, current, history, met


def test_the_network_meets_the_same_batches(record):
    met = trained()[-1]
    np.testing.assert_allclose(met[0].x_t, record["x_t"], atol=1e-6)
    np.testing.assert_allclose(np.stack([batch.t for batch in met]), record["t"], rtol=1e-6)
    np.testing.assert_array_equal(np.stack([batch.y for batch in met]), record["y"])


def test_the_weights_begin_the_same(record):
    model, start, *_ = trained()
    np.testing.assert_allclose(case.digest(official(start, model)), record["digest/start"], rtol=1e-9)


@pytest.mark.parametrize("part", ["loss", "loss_flow", "loss_repa"])
def test_losses_are_theirs_at_every_step(record, part):
    ours = np.array([row[part] for row in trained()[3]])
    worst = np.max(np.abs(ours / record[part] - 1))
    print(f"{part}: {worst:.1e} from theirs, relative, at the worst of {len(ours)} steps")
    assert worst <= 1e-5


@pytest.mark.parametrize(("kind", "which"), [("params", "params"), ("ema_fast", "ema")])
def test_weights_and_average_are_theirs_after_all_steps(record, kind, which):
    """Of each tensor the norm of the difference, by its inner products with random directions, beside the tensor's norm."""
    model, _, end, *_ = trained()
    tensors = official(getattr(end, which), model)
    ours, theirs = case.digest(tensors), record[f"digest/{kind}"]
    assert ours.shape == theirs.shape
    apart = np.sqrt(np.mean(np.square(ours[:, 1:] - theirs[:, 1:]), axis=1)) / theirs[:, 0]
    moved = np.sqrt(np.mean(np.square(record["digest/start"][: len(theirs), 1:] - theirs[:, 1:]), axis=1)) / theirs[:, 0]
    print(f"{kind}: {apart.max():.1e} from theirs at the worst tensor; the steps moved it by {np.median(moved):.1e} (median)")
    assert apart.max() <= 1e-4 < np.median(moved)
    if kind == "params":
        for name in case.WHOLE:
            np.testing.assert_allclose(
                tensors[name], record[f"params/{name}"], atol=1e-4 * np.abs(record[f"params/{name}"]).max()
            )
