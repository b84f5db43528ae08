"""Metrics while training: of the average and of the last weights, from a judge that is opened before the first step."""

import gc

import jax
import numpy as np
import pytest
import toy_network
from faults import harness

from dip_jax.errors import UserError
from dip_jax.jobs import train
from dip_jax.metrics import features
from dip_jax.runtime import writers
from dip_jax.training import loop, state, step

CHANGES = {"train__steps": 5, "train__eval_every": 2, "eval__num_samples": 8}


@pytest.fixture
def opened(monkeypatch, tmp_path) -> list[str]:
    """The toy in the place of lite0, a cache of this test's own, and how often a network was opened."""
    names: list[str] = []
    monkeypatch.setitem(features.NETWORKS, "lite0", lambda weights: names.append("lite0") or toy_network.network())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    features.open_network.cache_clear()
    yield names
    features.open_network.cache_clear()


def test_both_weights_are_judged_at_every_mark_and_nothing_stays_on_the_devices(dataset, tmp_path, opened, monkeypatch):
    others = jax.live_arrays()  # of other tests: held, so that they cannot go on the way and hide what stays
    held: list[tuple[int, int]] = []
    judge = loop.Run._evaluate

    def weigh() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays() if array.dtype == np.float32)  # not the batches in flight

    def measured(self):
        self._checkpoints.wait()  # a save under way holds arrays of its own
        before = weigh()
        judge(self)
        held.append((before, weigh()))

    monkeypatch.setattr(loop.Run, "_evaluate", measured)
    train.train(harness.tiny_config(dataset, eval__reference=str(dataset), **CHANGES), workdir=tmp_path / "run")
    rows = writers.read_rows(tmp_path / "run" / "eval.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert row["N"] == 8 and row["fid_toy"] != row["raw_fid_toy"] and {"is_toy", "raw_recall_toy"} <= row.keys()
    assert len({row["fid_toy"] for row in rows}) == 3  # the average moves
    assert opened == ["lite0"]
    assert sum(array.nbytes for array in others if array.dtype == np.float32) < held[0][1]
    after = [after for _, after in held]
    assert all(after <= before for before, after in held) and after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"train.eval_every=2 needs eval.reference='' to exist"),
        ({"eval__reference": "{}", "eval__features": "inception", "eval__weights": "none.pth"}, r"none\.pth: no such file"),
        ({"eval__reference": "{}", "eval__features": "inception"}, "needs weights"),
    ],
    ids=["reference", "weights", "no weights"],
)
def test_what_judging_needs_is_missed_before_compiling(dataset, tmp_path, changes, message, monkeypatch):
    for module, name in ((step, "compile_train_step"), (state, "init_sharded")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("compiled before the mistake was found"))
    changes = {key: value.format(dataset) for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        train.train(harness.tiny_config(dataset, **CHANGES, **changes), workdir=tmp_path / "run")
