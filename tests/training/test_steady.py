"""The loop in its stride: nothing is compiled after the second step, and nothing piles up."""

import gc
import pathlib

import jax
import numpy as np
import pytest
from faults import harness

from dip_jax import config
from dip_jax.jobs import train
from dip_jax.training import step


def run_watched(monkeypatch, dataset, workdir, *, steps, look) -> list:
    """Trains; what `look(number)` said before every step."""
    seen = []
    original = step.compile_train_step

    def compile_watched(*args, **kwargs):
        run = original(*args, **kwargs)

        def watched(*operands):
            seen.append(look(len(seen) + 1))
            return run(*operands)

        return watched

    monkeypatch.setattr(step, "compile_train_step", compile_watched)
    changes = {"train__steps": steps, "train__log_every": 3, "checkpoint__every_steps": 10 * steps}
    train.train(harness.tiny_config(dataset, **changes), workdir=workdir)
    assert len(seen) == steps
    return seen


def test_nothing_is_lowered_after_the_second_step(monkeypatch, dataset, tmp_path):
    lowered = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    before = run_watched(monkeypatch, dataset, tmp_path / "run", steps=12, look=lambda _: len(lowered))
    assert before[1] > before[0] > 0  # it hears the step's own
    assert before[-1] == before[2]


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_steps(monkeypatch, dataset, tmp_path):
    others = jax.live_arrays()  # of other tests: held, so that none is freed on the way, and not counted
    known = {id(array) for array in others}
    batch = harness.tiny_config(dataset).data.batch_size

    def look(number):
        if number not in (300, 1000):
            return None
        gc.collect()
        resident = pathlib.Path("/proc/self/statm").read_text().split()[1]
        own = [array for array in jax.live_arrays() if id(array) not in known]
        ahead = sum(array.dtype in (np.uint8, np.int32) and array.shape[:1] == (batch,) for array in own)
        return len(own) - ahead, ahead, int(resident) * 4096

    seen = run_watched(monkeypatch, dataset, tmp_path / "run", steps=1000, look=look)
    (arrays, _, resident), (arrays_after, ahead, resident_after) = seen[299], seen[999]
    assert 0 < arrays_after == arrays
    assert ahead <= 2 * (config.Data().prefetch + 2)
    assert resident_after - resident < 16 * 2**20
