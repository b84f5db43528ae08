"""bfloat16 on all three axes of a mesh at once: gradients summed over data, fsdp and tensor are those of one device."""

import jax
import numpy as np
import pytest
from small_models import randomise

from dip_jax import config
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.training import optim, state, step

MODEL = config.Model(
    size="tiny",
    depth=3,
    width=64,
    num_heads=4,
    patch_size=8,
    image_size=(32, 32),
    num_classes=5,
    head="mlp",
    head_width=32,
    head_depth=2,
    label_std=1.0,
)
OPTIM = config.Optim(learning_rate=1e-3)


def one_step(sizes: config.Mesh):
    """Adam's first moment after one step (a tenth of the gradient), the loss and the gradient's norm, on the host."""
    model = dip.from_config(MODEL)
    optimizer = optim.make_optimizer(OPTIM, total_steps=10)
    mesh = sharding.make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 5, 8).astype(np.int32),
    }
    weights = jax.tree.map(np.asarray, randomise(jax.jit(model.init)(jax.random.key(0))))  # no gradient is zero
    with jax.set_mesh(mesh):
        placed = state.state_shardings(model, optimizer, mesh)
        begun = state.with_first_weights(state.init_sharded(model, optimizer, 0, placed), weights, placed)
        run = step.compile_train_step(model, optimizer, placed, mesh, objective=config.Flow(), optim=OPTIM)
        done, metrics = run(begun, batch, jax.random.key(1))
    adam = next(part for part in jax.tree.leaves(done.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    return jax.tree.map(np.asarray, adam.mu), float(metrics["loss"]), float(metrics["grad_norm"])


def distance(a, b) -> float:
    """Of two arrays, over the length of the second."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_bfloat16_gradients_of_a_mixed_mesh_are_those_of_one_device():
    """Within what bfloat16 rounds: 3 % of a weight's gradient, whose sum over eight parts rounds in another order."""
    alone, loss_alone, norm_alone = one_step(config.Mesh(data=1))
    mixed, loss, norm = one_step(config.Mesh(data=2, fsdp=2, tensor=2))
    assert loss == pytest.approx(loss_alone, rel=2e-3) and norm == pytest.approx(norm_alone, rel=1e-2)
    off = {
        jax.tree_util.keystr(path): distance(x, y)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(mixed), jax.tree.leaves(alone), strict=True)
    }
    assert max(off.values()) < 0.03, sorted(off.items(), key=lambda item: -item[1])[:5]
