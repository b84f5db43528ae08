"""A run whose backbone starts from a DiT-only checkpoint (section 3.4)."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from faults import harness

from dip_jax import config
from dip_jax.checkpoints import checkpoint
from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.models import dip


def dit_only(like: config.Config, workdir: pathlib.Path, **changes):
    """A checkpoint of random weights without a head, and those weights."""
    network = dataclasses.replace(like.model, head="none", placement="post_hoc", **changes)
    params = jax.jit(dip.from_config(network).init)(jax.random.key(9))
    params = jax.tree.map(lambda a: a + 0.01, params)
    checkpoint.write_weights(workdir, params, config=dataclasses.replace(like, model=network))
    return params


def test_the_backbone_comes_from_the_checkpoint_and_the_head_from_the_seed(dataset, tmp_path):
    run = harness.tiny_config(dataset, train__steps=1, optim__learning_rate=1e-30)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, head="mlp"))
    backbone = dit_only(run, tmp_path / "dit")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, init_from=str(tmp_path / "dit")))
    train.train(run, workdir=tmp_path / "run")
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7)  # one step at a rate of 1e-30, averaged
    fresh = jax.jit(dip.from_config(run.model).init)(jax.random.key(run.train.seed))
    for weights in ("raw", "ema", "initial"):
        _, params = checkpoint.load(tmp_path / "run", weights=weights)
        jax.tree.map(close, params["blocks"], backbone["blocks"])
        jax.tree.map(close, params["head"], fresh["head"])


def test_weights_that_do_not_fit_are_refused_before_compiling(dataset, tmp_path):
    run = harness.tiny_config(dataset, train__steps=1)
    dit_only(run, tmp_path / "dit", depth=run.model.depth + 1)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, init_from=str(tmp_path / "dit")))
    with pytest.raises(UserError, match="do not fit this model: blocks"):
        train.train(run, workdir=tmp_path / "run")
