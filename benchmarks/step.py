"""The training step: images/s, TFLOP/s, share of the peak, memory and compile time of each variant; the loop against the step.

    python benchmarks/step.py                                     a step of DiP-tiny on two CPU cores
    python benchmarks/step.py --variants="scan:scan_layers=True;unroll:scan_layers=False,remat=none"
    python benchmarks/step.py --loop=datasets/photo_crops         its loop beside the bare step, chunk by chunk
    python benchmarks/step.py --size=B --batch=8 --rounds=7 --variants="base;two:internal=True;bank:ema_decays=0.9999/0.9996"
    python benchmarks/step.py --gpu --rounds=10                   DiP-XL/16, 256 px, bfloat16: one call on a GPU

A variant is name:key=value,... of fields of `config.Model`, `config.Flow` and `config.Optim`, and batch. All run in turn.
TFLOP/s are three forward passes by formula (`cost`), without what rematerialisation does again; XLA's own count of the step, a
scanned block counted once, is printed beside it. On an accelerator the most memory held is that of the process so far, so the
first variant's alone is exact.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import measuring
import numpy as np

from dip_jax import config
from dip_jax.data import pipeline, prepared
from dip_jax.models import dip
from dip_jax.runtime import sharding
from dip_jax.training import state, step
from dip_jax.training.optim import make_optimizer

CPU = "base;scan:scan_layers=True;dots:scan_layers=True,remat=dots;full:scan_layers=True,remat=full"
GPU = (
    "base:batch=128;no_head:batch=128,head=none;xla:batch=128,attention=xla;head_kept:batch=128,head_remat=False;"
    "big:batch=256;full:batch=128,remat=full;unroll:batch=128,scan_layers=False"
)
DEMO = {"head_width": 8, "num_classes": 10, "prediction": "x", "remat": "none", "head_remat": False, "scan_layers": False}
OPTIM = config.Optim(grad_clip=1.0)


class Case:
    """One variant: its compiled step and the state that goes through it."""

    def __init__(self, model: dip.DiP, batch: int, settings: Mapping[str, str]):
        objective, optim = (measuring.with_settings(section, settings) for section in (config.Flow(), OPTIM))
        mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
        optimizer = make_optimizer(optim, total_steps=1000)
        placed = state.state_shardings(model, optimizer, mesh, averages=len(optim.ema_decays))
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (batch, *model.config.image_size, 3), dtype=np.uint8)
        self.model, self.mesh, self._optimizer, self._placed = model, mesh, optimizer, placed
        self.batch = jax.device_put({"image": image, "label": np.zeros(batch, np.int32)})
        self.key = jax.random.key(0)
        with jax.set_mesh(mesh):
            shapes = state.abstract_state(model, optimizer, placed)
            self._formats = state.formats(shapes)
            run = step.compile_train_step(model, optimizer, self._formats, mesh, objective=objective, optim=optim)
            self.built = measuring.build_jitted(run, shapes, self.batch, self.key)
        self.restart()

    def restart(self) -> None:
        """A fresh state; `release` lets go of it, so that variants need not fit beside each other."""
        with jax.set_mesh(self.mesh):
            self.state = jax.device_put(state.init_sharded(self.model, self._optimizer, 0, self._placed), self._formats)

    def release(self) -> None:
        self.state = None

    def __call__(self, batch=None):
        self.state, metrics = self.built.call(self.state, self.batch if batch is None else batch, self.key)
        return metrics


def measure(options: argparse.Namespace) -> list[dict]:
    rows, cases = [], {}
    for name, settings in measuring.within(options.minutes, measuring.variants(options.variants)):
        fields = {} if options.gpu else DEMO
        model = measuring.make_model(options.size, options.image_size, settings, **fields)
        cases[name] = case = Case(model, int(settings.get("batch", options.batch)), settings)
        jax.block_until_ready(case())
        rows.append({"variant": name, "settings": settings, "peak_bytes": measuring.peak_bytes()})
        print(f"compiled {name} in {case.built.cold:.0f} s, {case.built.warm:.0f} s cached", file=sys.stderr, flush=True)
        if options.gpu:
            case.release()
    times = turns(cases, options) if options.gpu else measuring.interleave(cases, rounds=options.rounds)
    for row in rows:
        case, timing = cases[row["variant"]], times[row["variant"]]
        images = case.batch["label"].shape[0]
        flops = 3 * images * measuring.forward_flops(case.model)
        rate = flops / timing["seconds"]
        row |= {**timing, "images": images, "images_per_second": images / timing["seconds"], "flops": flops}
        row |= {"xla_flops": case.built.xla_flops, "flops_per_second": rate, "mfu": measuring.utilisation(rate)}
        row |= {"temp_bytes": case.built.temp_bytes}
        row |= {"compile_seconds": case.built.cold, "compile_cached_seconds": case.built.warm}
    return rows


def turns(cases: dict[str, Case], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """As `interleave`, in bursts with one state at a time on the device."""
    taken = {name: [] for name in cases}
    for _ in range(2):
        for name, case in cases.items():
            case.restart()
            taken[name].append(measuring.interleave({name: case}, rounds=options.rounds)[name])
            case.release()
    return {name: {key: float(np.mean([part[key] for part in parts])) for key in parts[0]} for name, parts in taken.items()}


def loop(options: argparse.Namespace) -> list[dict]:
    """Chunks of steps in turn: on one batch over and over; as the loop does it, with real batches and metrics one step late."""
    settings = next(iter(measuring.variants(options.variants.split(";")[0]).values()))
    model = measuring.make_model(options.size, options.image_size, settings, **DEMO)
    case, pending = Case(model, options.batch, settings), None
    data = config.Data(path=options.loop, batch_size=options.batch, num_threads=2)
    batches = pipeline.batches(
        prepared.open_dataset(options.loop),
        data,
        mesh=case.mesh,
        image_size=options.image_size,
        num_classes=model.config.num_classes,
        seed=0,
    )
    waits = []

    def bare():
        for _ in range(options.chunk):
            metrics = case()
        return metrics

    def full():
        nonlocal pending
        for _ in range(options.chunk):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            metrics = case(batch)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
        return metrics

    times = measuring.interleave({"bare": bare, "loop": full}, rounds=options.rounds)
    batches.close()
    rows = [{"variant": name, **timing} for name, timing in times.items()]
    wall = {row["variant"]: row["wall_seconds"] for row in rows}
    rows.append({"loop_over_bare_wall": wall["loop"] / wall["bare"], "median_wait_for_data": float(np.median(waits))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="sizes and variants of the paper's model")
    parser.add_argument("--size", help="row of config.SIZES")
    parser.add_argument("--variants")
    for name in ("image_size", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loop", metavar="DATASET", help="measure the loop on this dataset")
    parser.add_argument("--chunk", type=int, default=20, help="steps per turn of --loop")
    parser.add_argument("--minutes", type=float, default=5.0, help="no further variant is compiled after so long")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    presets = {"size": "XL", "variants": GPU, "image_size": 256, "batch": 128}
    presets = presets if options.gpu else {"size": "tiny", "variants": CPU, "image_size": 64, "batch": 16}
    for name, value in presets.items():
        setattr(options, name, getattr(options, name) or value)
    rows = loop(options) if options.loop else measure(options)
    if options.loop:
        print(*rows, sep="\n")
    else:
        header = ("variant", "images/s", "s/step", "low", "high", "GFLOP", "XLA GFLOP", "GFLOP/s", "MFU", "temp MiB")
        header += ("peak MiB", "compile s", "cached s")
        lines = [
            [row["variant"], row["images_per_second"], row["seconds"], row["low"], row["high"], row["flops"] / 1e9]
            + [row["xla_flops"] / 1e9, row["flops_per_second"] / 1e9, row["mfu"], row["temp_bytes"] / 2**20]
            + [row["peak_bytes"] / 2**20, row["compile_seconds"], row["compile_cached_seconds"]]
            for row in rows
        ]
        print(measuring.table(header, lines))
    what = "loop" if options.loop else "step"
    measuring.save(what, measuring.asked(options), rows, out=options.out)


if __name__ == "__main__":
    main()
