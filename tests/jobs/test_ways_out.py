"""Each way out that a message of `train` names is one: the advice is taken from the message and followed."""

import re
import shutil

import numpy as np
import pytest
from etils import epath
from faults import harness

from dip_jax.checkpoints import checkpoint
from dip_jax.data import pipeline
from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.training import config_change

BEGUN = {"train__steps": 4, "checkpoint__every_steps": 4}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def four_steps(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("begun") / "run"
    train.train(harness.tiny_config(dataset, **BEGUN), workdir=workdir)
    return workdir


@pytest.fixture
def begun(four_steps, dataset, tmp_path):
    """How to go on in a copy of a run of four steps: `allow_change`, changes of the config; returns the workdir."""
    workdir = tmp_path / "run"
    shutil.copytree(four_steps, workdir)

    def go_on(*allowed, **changes):
        train.train(harness.tiny_config(dataset, **{**BEGUN, **changes}), workdir=workdir, allow_change=allowed)
        return workdir

    return go_on


def advice(go_on, **changes) -> list[str]:
    """The keys that the refusal of these changes says to allow."""
    with pytest.raises(UserError) as refused:
        go_on(**changes)
    return re.search(r"--allow_change=(\S+)$", str(refused.value)).group(1).split(",")


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__grad_clip": 1.0, "optim__learning_rate": 1e-4, "optim__b2": 0.95, "optim__weight_decay": 0.01},
        slow({"optim__schedule": "cosine", "train__steps": 6, "optim__warmup_steps": 5}),
        slow({"data__flip": True, "data__on_bad_record": "replace"}),
        slow({"flow__t_shift": 2.0, "flow__label_dropout": 0.2, "model__prediction": "x", "model__dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_the_change_that_the_message_offers_goes_on(begun, changes):
    changes = {"train__steps": 5, **changes}
    workdir = begun(*advice(begun, **changes), **changes)
    assert [row["step"] for row in harness.curve(workdir)] == [*range(1, changes["train__steps"] + 1)]


@pytest.mark.slow
def test_clipping_taken_away_again_keeps_the_moments(begun, four_steps, dataset, tmp_path):
    begun("optim.grad_clip", optim__grad_clip=1e6, train__steps=5)  # which clips nothing
    clipped = begun("optim.grad_clip", train__steps=6)
    shutil.copytree(four_steps, tmp_path / "plain")
    train.train(harness.tiny_config(dataset, **{**BEGUN, "train__steps": 6}), workdir=tmp_path / "plain")
    ways = [[row["loss"] for row in harness.curve(path)] for path in (clipped, tmp_path / "plain")]
    assert len(ways[0]) == 6
    np.testing.assert_allclose(*ways, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"train__seed": 3}, "train.seed: 0 -> 3"),
        ({"model__depth": 2}, "model.depth: 1 -> 2"),
        ({"model__image_size": (32, 32)}, "model.image_size"),
    ],
    ids=str,
)
def test_what_nothing_can_allow_is_not_offered(dataset, changes, named):
    old, new = harness.tiny_config(dataset), harness.tiny_config(dataset, **changes)
    with pytest.raises(UserError, match=named) as refused:
        config_change.check(old, new, allowed=[])
    assert "--allow_change" not in str(refused.value)
    with pytest.raises(UserError, match=f"--allow_change does not help with .*{named}"):
        config_change.check(old, new, allowed=[key.replace("__", ".") for key in changes])


def test_another_batch_size_goes_on_at_the_same_image_and_repeats_exactly(begun, four_steps, dataset, tmp_path, monkeypatch):
    positions = []

    def record_at(asked, **order):
        positions.extend(asked)
        return original(asked, **order)

    original = pipeline.record_at
    monkeypatch.setattr(pipeline, "record_at", record_at)
    changes = {"data__batch_size": 16, "train__steps": 6}
    begun(*advice(begun, **changes), **changes)
    assert min(positions) == 4 * 8
    positions.clear()
    workdir = begun(data__batch_size=16, train__steps=7)
    assert min(positions) == 4 * 8 + 2 * 16
    assert checkpoint.read_record(epath.Path(workdir / "checkpoints" / "7")).data["offset"] == 4 * 8 - 4 * 16

    once = tmp_path / "once"
    shutil.copytree(four_steps, once)
    changes = {**BEGUN, "data__batch_size": 16, "train__steps": 7}
    train.train(harness.tiny_config(dataset, **changes), workdir=once, allow_change=["data.batch_size"])
    assert harness.curve(workdir) == harness.curve(once)
