"""The options beyond the paper all at once: with heads, placements, meshes, recomputation, alignment and a resume."""

import dataclasses

import dinov2_cases
import jax
import numpy as np
import pytest
import small_training
from faults import harness
from safetensors.numpy import save_file

from dip_jax import config
from dip_jax.checkpoints import checkpoint
from dip_jax.jobs import train
from dip_jax.models import asym, dinov2
from dip_jax.sampling import trajectories

pytestmark = pytest.mark.slow

MODEL = {"prediction": "asym", "subspace_rank": 4, "internal": True, "context_tokens": 4}
FLOW = config.Flow(frequency_weight=1.0)
OPTIM = config.Optim(learning_rate=1e-3, ema_decays=(0.9, 0.5))
HEAD = {"head_width": 8, "head_depth": 2, "head_remat": False}


def with_subspace(tree):
    """The same basis everywhere; without one `asym` is `x`."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal(tree[asym.SUBSPACE].shape))[0]
    return {**tree, asym.SUBSPACE: basis.astype(np.float32)}


@pytest.mark.parametrize("head", [("unet", "hybrid"), ("attention", "post_hoc")])
def test_they_train_alike_on_one_device_and_on_three_axes_with_recomputation(head):
    def start(fresh):
        return fresh.replace(params=with_subspace(fresh.params), emas=tuple(map(with_subspace, fresh.emas)))

    fields = MODEL | HEAD | {"head": head[0], "placement": head[1], "inject_after": 2}
    told = {"flow": FLOW, "optimizer": OPTIM, "start": start}
    one, first = small_training.run(fields, 2, **told)
    split = config.Mesh(data=2, fsdp=2, tensor=2, zero1=True)
    fields |= {"remat": "dots", "scan_layers": False, "head_remat": True}
    many, other = small_training.run(fields, 2, mesh=split, **told)
    for a, b in zip(first, other, strict=True):
        assert {"loss_flow", "loss_internal", "loss_frequency"} <= set(a) and a["skipped"] == 0
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    assert len(one.emas) == len(many.emas) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.params, many.params)


def test_they_go_on_exactly_with_alignment_and_draw(tmp_path):
    dataset = harness.make_dataset(tmp_path / "data")
    file = tmp_path / "teacher.safetensors"
    save_file(dinov2_cases.random_tensors(dinov2.DinoV2(width=64, depth=1, table_side=3)), file)
    base = harness.tiny_config(dataset, train__steps=4, data__batch_size=16)
    fields = MODEL | HEAD | {"depth": 3, "head": "unet", "placement": "hybrid"}
    made = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **fields),
        flow=FLOW,
        optim=dataclasses.replace(base.optim, ema_decays=(0.9, 0.5), accumulate=2),
        repa=config.Repa(weight=0.5, layer=2, encoder=str(file)),
    )
    train.train(made, workdir=tmp_path / "whole")
    train.train(dataclasses.replace(made, train=dataclasses.replace(made.train, steps=2)), workdir=tmp_path / "parts")
    train.train(made, workdir=tmp_path / "parts")
    for weights in ({}, {"ema": 0.5}, {"weights": "raw"}):
        (model, whole), (_, parts) = (checkpoint.load(tmp_path / name, **weights) for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, whole, parts)
        assert "projector" not in whole
    options = config.Sample(steps=4, guidance=2.0, interval=(0.0, 1.0), internal_guidance=1.4, batch_size=4)
    guide = trajectories.Weaker(*checkpoint.load(tmp_path / "whole", ema=0.5))
    drawn = {
        name: np.concatenate([i for _, i in trajectories.draw_batches(model, whole, labels=[0, 1, 2], seed=0, **each)])
        for name, each in {
            "both": {"options": options, "guide": guide},
            "internal": {"options": options},
            "neither": {"options": dataclasses.replace(options, internal_guidance=1.0)},
        }.items()
    }
    assert all(images.shape == (3, 16, 16, 3) for images in drawn.values())
    assert (drawn["both"] != drawn["internal"]).any() and (drawn["internal"] != drawn["neither"]).any()
