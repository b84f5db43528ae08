"""A run whose backbone starts from a DiT-only checkpoint (section 3.4)."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from faults import harness

from dip_jax import config
from dip_jax.checkpoints import checkpoint, release
from dip_jax.data import prepared
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


def test_other_classes_and_patches_carry_over_and_are_told(dataset, tmp_path, capsys):
    run = harness.tiny_config(dataset, train__steps=1, optim__learning_rate=1e-30)
    model = dataclasses.replace(run.model, head="none")
    half, names = model.patch_size // 2, ("zebra", *prepared.open_dataset(dataset).classes[:0:-1])
    smaller = dataclasses.replace(
        model, patch_size=half, image_size=tuple(s // 2 for s in model.image_size), num_classes=len(names)
    )
    source = jax.tree.map(lambda a: a + 0.01, jax.jit(dip.from_config(smaller).init)(jax.random.key(9)))
    record = checkpoint.Record(dataclasses.replace(run, model=smaller), {}, classes=names)
    release.write_release(tmp_path / "small", source, record, step=1)
    start = dataclasses.replace(run.train, init_from=str(tmp_path / "small"))
    run = dataclasses.replace(run, model=model, train=start)
    train.train(run, workdir=tmp_path / "run")
    said = capsys.readouterr().err
    count = len(names)
    assert f"the backbone; {count - 1} of {model.num_classes} classes by name, {model.num_classes - count + 1} new" in said
    assert f"patches of {half} resized to {model.patch_size}" in said
    table, old = (params["condition"]["label"]["table"] for params in (checkpoint.load(tmp_path / "run")[1], source))
    expected = [old[names.index(name)] if name in names else old[-1] for name in prepared.open_dataset(dataset).classes]
    np.testing.assert_allclose(table, np.stack([*expected, old[-1]]), rtol=0, atol=1e-7)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7)
    jax.tree.map(close, *(checkpoint.load(tmp_path / "run", weights=weights)[1] for weights in ("ema", "initial")))


def test_raw_weights_are_taken_where_they_are_asked_for(dataset, tmp_path):
    first = harness.tiny_config(dataset, train__steps=4)
    train.train(first, workdir=tmp_path / "first")
    for weights in ("raw", "ema"):
        start = dataclasses.replace(first.train, steps=1, init_from=str(tmp_path / "first"), init_weights=weights)
        run = dataclasses.replace(first, train=start, optim=dataclasses.replace(first.optim, learning_rate=1e-30))
        train.train(run, workdir=tmp_path / weights)
        expected = checkpoint.load(tmp_path / "first", weights=weights)[1]
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7), checkpoint.load(tmp_path / weights)[1], expected
        )
