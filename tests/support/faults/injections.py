"""Faults planted inside a child before it trains; each is a function that patches one seam."""

import errno
import os
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp

from dip_jax.checkpoints import checkpoint, manifest
from dip_jax.data import pipeline, prepared
from dip_jax.errors import UserError
from dip_jax.runtime import profiling, storage
from dip_jax.sampling import sample_files
from dip_jax.training import bad_numbers, loop, showing, step


def _harm_batches(harm) -> None:
    """Lets `harm(k, batch)` change every batch k before the step sees it."""
    original = pipeline.batches

    class Harmed:
        def __init__(self, inner, start, salt):
            self._inner, self._k, self._salt = inner, start, salt

        def __next__(self):
            batch = next(self._inner)
            self._k += 1
            return harm(self._k - 1, self._salt, batch)

        @property
        def replaced(self):
            return self._inner.replaced

        def close(self):
            self._inner.close()

    def batches(*args, **kwargs):
        return Harmed(original(*args, **kwargs), kwargs.get("start_step", 0), kwargs.get("salt", 0))

    pipeline.batches = batches


def _nan_from(first: int, last: int, *, only_salt: int | None = None) -> None:
    """Makes the loss NaN for batches first..last by a scale that the step multiplies pixels with."""
    original = step.to_float

    def to_float(image):
        # A batch whose very first pixel is 255, 255, 255 after `harm` is poisoned.
        value = original(image)
        poisoned = jnp.all(image[:, 0, 0] == 255)
        return jnp.where(poisoned, jnp.float32(jnp.nan), value)

    step.to_float = to_float

    def harm(k, salt, batch):
        if first <= k <= last and only_salt in (None, salt):
            batch = {**batch, "image": batch["image"].at[:, 0, 0].set(255)}
        return batch

    _harm_batches(harm)


def nan_once() -> None:
    """Batch 4 is not finite."""
    _nan_from(4, 4)


def nan_never() -> None:
    """The program of the faults with NaN, and none of its batches is harmed."""
    _nan_from(1 << 30, 1 << 30)


def nan_streak() -> None:
    """Batches 5..20 are not finite, in the first order of the data only."""
    _nan_from(5, 20, only_salt=0)


def nan_for_ever() -> None:
    """All batches from 5 on are not finite, whatever the order."""
    _nan_from(5, 1 << 30)


def hang() -> None:
    """Batch 4 never comes."""

    def harm(k, salt, batch):
        if k == 4:
            time.sleep(3600)
        return batch

    _harm_batches(harm)


def no_data_on_host_1() -> None:
    """The dataset is not there on the second host."""
    original = prepared.open_dataset

    def open_dataset(*args, **kwargs):
        if jax.process_index() == 1:
            raise UserError("no such dataset here")
        return original(*args, **kwargs)

    prepared.open_dataset = open_dataset


def slow_steps(seconds: float = 0.1) -> None:
    """Every batch takes a tenth of a second, so that signals meet a run in full swing."""

    def harm(k, salt, batch):
        time.sleep(seconds)
        return batch

    _harm_batches(harm)


def slow_samples(seconds: float = 0.3) -> None:
    """Every batch of samples takes that long to be written, so that kills meet a run in full swing."""
    original = sample_files.NpzFile.write

    def write(self, batch, images):
        time.sleep(seconds)
        original(self, batch, images)

    sample_files.NpzFile.write = write


def slow_delete() -> None:
    """Deleting a file takes 20 ms, so that kills meet half-deleted steps."""
    original = os.unlink

    def unlink(*args, **kwargs):
        time.sleep(0.02)
        original(*args, **kwargs)

    os.unlink = unlink


def nan_parameter() -> None:
    """At update 6 of the first order of the data, one parameter in memory becomes NaN, as by a failing chip."""
    original = step.compile_train_step
    harmed = []

    def compile_train_step(*args, **kwargs):
        inner = original(*args, **kwargs)

        def train_step(state, batch, key):
            state, metrics = inner(state, batch, key)
            if not harmed and int(jax.device_get(state.step)) == 6:
                harmed.append(True)
                with jax.transfer_guard("allow"):
                    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan, device=leaf.sharding), state.params)
                state = state.replace(params=params)
            return state, metrics

        return train_step

    step.compile_train_step = compile_train_step


def blind_to_space() -> None:
    """The check of free space sees nothing, so that the disk fills up in the middle of a save."""
    storage.require_space = lambda path, needed: None


def killed_before_the_picture() -> None:
    """The process dies when the last step is saved and its picture is about to be drawn."""

    def show_samples(self):
        self._checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    loop.Run._show_samples = show_samples


def second_save_fails() -> None:
    """The second save finds no room when it has gone into the background."""
    original, calls = manifest.write_manifest, []

    def write_manifest(path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    manifest.write_manifest = write_manifest
    slow_steps()


def known_times() -> None:
    """Steps and batches take tenths of a second each; starting, saving, judging and profiles take seconds. All say so.

    What these four do beside is not nothing on a busy machine, and said with it, by a clock of its own.
    """
    inside = []

    def lasting(part: str, seconds: float, action):
        def wrapped(*args, **kwargs):
            inside.append(part)
            began = time.perf_counter()
            time.sleep(seconds)
            result = action(*args, **kwargs)
            inside.pop()
            if not inside:
                print(f"\ninjected {part} {time.perf_counter() - began:.4f}", file=sys.stderr, flush=True)
            return result

        return wrapped

    compiled = step.compile_train_step

    def compile_train_step(*args, **kwargs):
        inner, calls = compiled(*args, **kwargs), []
        slow = lasting("steps", 0.25, inner)

        def train_step(*args):
            calls.append(True)
            return slow(*args) if len(calls) > 1 else inner(*args)  # the first is compiling

        return train_step

    step.compile_train_step = compile_train_step
    _harm_batches(lambda k, salt, batch: lasting("data", 0.1, lambda: batch)())
    checkpoint.Checkpoints.save = lasting("saving", 2.0, checkpoint.Checkpoints.save)
    checkpoint.Checkpoints.wait = lasting("saving", 0.0, checkpoint.Checkpoints.wait)
    all_finite = bad_numbers.all_finite  # compiled at the first save
    bad_numbers.all_finite = lasting("saving", 0.0, lambda state: bool(all_finite(state)))
    showing.judge.open_judge = lambda *args, **kwargs: lambda images: types.SimpleNamespace(metrics={"N": len(images.labels)})
    showing.Show.metrics = lasting("showing", 2.0, showing.Show.metrics)
    profiling.Profiler.turn = lasting("profiling", 1.0, profiling.Profiler.turn)
    prepared.open_dataset = lasting("start_up", 2.0, prepared.open_dataset)
