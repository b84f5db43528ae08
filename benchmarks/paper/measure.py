"""What is measured of a run: a loss without luck, fid_lite0, step times taken in turns, features, the likeness of an image."""

import functools
import os
import pathlib
import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper.scale import Scale
from dip_jax import config, flow
from dip_jax.checkpoints import checkpoint, directories
from dip_jax.data import prepared
from dip_jax.metrics import features, inputs
from dip_jax.metrics.judge import Judge
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.training import optim, state, step

_BATCH = 64  # validation images at once
_DRAWS = 4  # noises and times per validation image


def validation_loss(model: dip.DiP, params, images: np.ndarray, labels: np.ndarray, *, objective: config.Flow) -> float:
    """Mean loss over `_DRAWS` fixed draws of noise and time per image: the same for every run, so no luck is in it."""

    @jax.jit
    def loss(params, key, image, label):
        kept = config.Flow(t_mean=objective.t_mean, t_std=objective.t_std, t_shift=objective.t_shift, label_dropout=0.0)
        batch = flow.corrupt(key, step.to_float(image), label, flow=kept, model=model.config)
        return flow.loss(functools.partial(model.apply, params), batch, model=model.config)

    values = [
        float(loss(params, jax.random.fold_in(jax.random.key(draw), start), images[start:][:_BATCH], labels[start:][:_BATCH]))
        for draw in range(_DRAWS)
        for start in range(0, len(images) // _BATCH * _BATCH, _BATCH)
    ]
    return statistics.fmean(values)


def quality(workdir: pathlib.Path, scale: Scale, data: pathlib.Path) -> dict[str, float | int]:
    """Loss and fid_lite0 of the averaged weights of a run, and its size."""
    model, params = checkpoint.load(workdir)
    images, labels = read_images(data / "validation", scale.num_reference)
    samples = inputs.drawn_samples(model, params, count=scale.num_samples, seed=0, options=scale.sample)
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    objective = checkpoint.read_record(directories.find(workdir, verify=False, report=print)).config.flow
    return {
        "loss": validation_loss(model, params, images, labels, objective=objective),
        "fid_lite0": judge(data, scale.num_reference)(samples).metrics["fid_lite0"],
        "N": scale.num_samples,
        "parameters": sum(counts.values()),
        "head_parameters": counts.get("head", 0) + counts.get("inject_head", 0) + counts.get("inject", 0),
    }


@functools.lru_cache(maxsize=2)
def read_images(folder: pathlib.Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of a dataset, spread evenly over it: uint8 [N, H, W, 3], int32 [N]."""
    dataset = prepared.open_dataset(folder)
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
    records = [dataset[i] for i in chosen]
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records], np.int32)


@functools.lru_cache(maxsize=1)
def judge(data: pathlib.Path, count: int) -> Judge:
    """Judges against `count` validation images; their statistics are taken once."""
    reference = inputs.dataset_images(prepared.open_dataset(data / "validation"), count=count)
    return Judge(features.open_network("lite0"), reference, batch_size=50)


def step_seconds(configs: Mapping[str, config.Config], *, rounds: int = 5, each: int = 3) -> dict[str, float]:
    """Seconds per training step of each config on a constant batch: the median of rounds in which all take turns.

    On a CPU, seconds of processor time over the number of cores, so that other programs count little.
    """
    on_cpu = jax.default_backend() == "cpu"
    clock = (lambda: time.process_time() / len(os.sched_getaffinity(0))) if on_cpu else time.perf_counter
    mesh = sharding.make_mesh(config.Mesh())
    times: dict[str, list[float]] = {name: [] for name in configs}
    with jax.set_mesh(mesh):
        ready = {name: _compiled_step(settings, mesh) for name, settings in configs.items()}
        for turn in range(rounds + 1):
            for name, (train_step, carry, batch) in ready.items():
                began = clock()
                for _ in range(each):
                    carry, metrics = train_step(carry, batch, jax.random.key(0))
                jax.block_until_ready(metrics)
                if turn:  # the first round compiles
                    times[name].append((clock() - began) / each)
                ready[name] = (train_step, carry, batch)
    return {name: statistics.median(values) for name, values in times.items()}


def _compiled_step(settings: config.Config, mesh) -> tuple:
    model = dip.from_config(settings.model)
    optimizer = optim.make_optimizer(settings.optim, total_steps=settings.train.steps)
    shardings = state.state_shardings(model, optimizer, mesh)
    train_step = step.compile_train_step(model, optimizer, shardings, mesh, objective=settings.flow, optim=settings.optim)
    size = settings.data.batch_size
    batch = {"image": np.zeros((size, *settings.model.image_size, 3), np.uint8), "label": np.zeros(size, np.int32)}
    return train_step, state.init_sharded(model, optimizer, 0, shardings), batch


def pooled_features(workdir: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Mean over patches of the tokens after the last block, [N, D]: of images half way to noise, without their class."""
    model, params = checkpoint.load(workdir)

    @jax.jit
    def features_of(params, image):
        eps = jax.random.normal(jax.random.key(0), image.shape, jnp.float32)
        t = jnp.full((image.shape[0],), 0.5, jnp.float32)
        x_t = flow.interpolate(step.to_float(image), eps, t)
        return model.features(params, x_t, t, jnp.full((image.shape[0],), model.config.num_classes, jnp.int32)).mean(axis=1)

    return np.concatenate(
        [np.asarray(features_of(params, part)) for part in np.array_split(images, max(len(images) // 100, 1))]
    )


def likeness(image: np.ndarray, original: np.ndarray) -> dict[str, float]:
    """PSNR in dB, and the error at periods below 16 pixels (inside a patch) as a share of what the original has there."""
    image, original = (each.astype(np.float64) / 255 for each in (image, original))
    difference = image - original
    frequency = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.fftfreq(image.shape[1])[None, :])
    fine = frequency > 1 / 16

    def energy(values: np.ndarray) -> float:
        return float((np.abs(np.fft.fft2(values, axes=(0, 1)))[fine] ** 2).sum())

    return {
        "psnr": float(-10 * np.log10(max(np.mean(difference**2), 1e-12))),
        "high_frequency_error": energy(difference) / energy(original),
    }
