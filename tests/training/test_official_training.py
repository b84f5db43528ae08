"""Our training step beside the authors' own, from the same weights, images, noise, times and labels: twenty steps, recorded."""

import contextlib
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case

from dip_jax import config, flow
from dip_jax.checkpoints import torch_names
from dip_jax.models import dinov2, dip
from dip_jax.runtime import sharding
from dip_jax.training import repa, state, step
from dip_jax.training.optim import make_optimizer

SETTINGS = case.SETTINGS
STEPS = SETTINGS["steps"]
WEIGHTS = 3e-5  # of a tensor's norm: PyTorch on one thread and without mkldnn is 8e-6 away from itself
BRISK = {"xla_backend_optimization_level": 1}  # twenty unoptimised steps would take longer than compiling these


PROJECTOR = {"in": "0.0", "hidden": "0.2", "out": "0.4"}  # our names and theirs


def projector_params(tensors):
    return {name: {"kernel": tensors[f"{at}.weight"].T, "bias": tensors[f"{at}.bias"]} for name, at in PROJECTOR.items()}


def projector_tensors(params):
    for name, at in PROJECTOR.items():
        yield f"proj.{at}.weight", np.asarray(params[name]["kernel"]).T
        yield f"proj.{at}.bias", np.asarray(params[name]["bias"])


def key_of(step):
    return jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), jnp.asarray(step).astype(jnp.uint32)]))


@contextlib.contextmanager
def drawing():
    """Whatever is drawn, is drawn from the recorded numbers: a key folded with a step holds its number, and so do its parts."""
    steps = [case.inputs(k) for k in range(STEPS)]
    numbers = {name: jnp.stack([step[name] for step in steps]) for name in ("normal", "noise", "uniform")}

    def of(name, key):
        return numbers[name][jax.random.key_data(key)[1]]

    ours = types.SimpleNamespace(
        split=lambda key, count: [key] * count,
        normal=lambda key, shape, dtype: of("normal" if len(shape) == 1 else "noise", key),
        bernoulli=lambda key, rate, shape: of("uniform", key) < rate,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "fold_in", lambda key, step: key_of(step))
        patch.setattr(flow, "jax", types.SimpleNamespace(random=ours, nn=jax.nn))
        yield


@pytest.fixture(scope="module")
def theirs():
    with np.load(case.ANSWERS) as file:
        recorded = dict(file)
    assert json.loads(str(recorded["settings"])) == SETTINGS
    return recorded


@pytest.fixture(scope="module")
def ours(theirs):
    """The metrics of every step, and by name the tensors of the weights and averages before or after them."""
    shapes = json.loads(str(theirs["shapes"]))
    weights = {part: case.random_tensors(part, shapes[part]) for part in shapes}
    size = (SETTINGS["image_size"],)
    model, params = torch_names.to_params(weights["denoiser"], source="dip", image_size=size, dtype="float32")
    encoder, frozen = dinov2.from_torch(weights["encoder"])
    alignment = repa.align(config.Repa(weight=SETTINGS["weight"], layer=SETTINGS["layer"]), model, encoder)
    fields = {name: SETTINGS[name] for name in ("learning_rate", "b1", "b2", "eps", "weight_decay")}
    optim = config.Optim(**fields, ema_decays=(SETTINGS["ema_fast"],))
    network = dip.from_config(dataclasses.replace(model, remat="none", head_remat=False))  # quicker to compile
    optimizer = make_optimizer(optim, total_steps=STEPS)
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        shardings = state.state_shardings(network, optimizer, mesh, alignment=alignment)
        places = jax.tree.map(lambda a: a.sharding, repa.abstract_teacher(alignment, mesh))
        objective = config.Flow(label_dropout=SETTINGS["label_dropout"])
        kinds = {"objective": objective, "optim": optim, "alignment": alignment, "frozen": places}
        compiled = step.compile_train_step(network, optimizer, shardings, mesh, **kinds)
        everything = repa.with_projector(params, projector_params(weights["proj"]))
        start = state.TrainState(np.int32(0), everything, jax.jit(optimizer.init)(everything), (params,))
        current, frozen = jax.device_put(start, shardings), jax.device_put(frozen, places)
        batches = [
            {"image": given["image"], "label": given["label"].astype(np.int32)} for given in map(case.inputs, range(STEPS))
        ]
        with drawing():
            lowered = compiled.lower(current, batches[0], key_of(0), frozen)
        found, history, run = {"digest/start": tensors_of(current, model)}, [], lowered.compile(compiler_options=BRISK)
        for batch in batches:
            current, metrics = run(current, batch, key_of(0), frozen)
            history.append({name: float(value) for name, value in metrics.items()})
    found["digest/params"] = tensors_of(current, model)
    found["digest/ema_fast"] = dict(torch_names.to_tensors(current.ema, model))
    return history, found


def tensors_of(current, model):
    tensors = dict(torch_names.to_tensors(current.weights, model))
    return tensors | dict(projector_tensors(current.params[repa.PROJECTOR]))


def test_the_network_is_given_the_same(theirs):
    model, options = config.Model(size="tiny", num_classes=SETTINGS["num_classes"]), config.Flow()
    with drawing():
        for k, given in enumerate(map(case.inputs, range(STEPS))):
            image, label = step.to_float(jnp.asarray(given["image"])), jnp.asarray(given["label"], jnp.int32)
            corrupted = flow.corrupt(key_of(k), image, label, flow=options, model=model)
            np.testing.assert_allclose(corrupted.t, theirs["t"][k], rtol=3e-7)
            np.testing.assert_array_equal(corrupted.y, theirs["y"][k])
            if k == 0:
                np.testing.assert_allclose(corrupted.x_t, theirs["x_t"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "loss_flow", "loss_repa"])
def test_losses_of_every_step_are_theirs(name, ours, theirs):
    history, _ = ours
    np.testing.assert_allclose([row[name] for row in history], theirs[name], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digest/start", "digest/params", "digest/ema_fast"])
def test_weights_and_average_are_theirs(name, ours, theirs):
    """Tensor by tensor; the twenty steps move them by 0.6 % of their norm (median), the average by 0.4 %."""
    _, found = ours
    difference = case.digest(found[name]) - theirs[name]
    relative = np.sqrt(np.mean(difference[:, 1:] ** 2, axis=1)) / theirs[name][:, 0]
    far = {tensor: float(size) for tensor, size in zip(found[name], relative, strict=True) if size > WEIGHTS}
    assert not far
