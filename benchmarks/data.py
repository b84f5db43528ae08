"""How fast images come in, per core; what a million records cost; what reading costs a training step.

    python benchmarks/data.py --what=read      Pillow alone (the ceiling), our pipeline with 0, 1, 2 workers, stored crops
    python benchmarks/data.py --what=scale     1.28 million records: start, resume at step 700,000, memory over 10,000 batches
    python benchmarks/data.py --what=step      step time with real data against a constant batch, on whatever jax finds:
                                               --config=FILE --batch=N, photographs in three encodings or --data=DIR

Every rate is images per second of CPU time (user + system, workers included), so that it does not depend on what else the
machine does: times the cores of a host it is what that host can feed. So is a step's time on a CPU, where reading takes from
the step what it uses; on an accelerator it is wall time. Results go to benchmarks/results/data_*.json.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import runpy
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import measuring
import numpy as np
import PIL
from absl import app, flags
from PIL import Image

from dip_jax import config
from dip_jax.data import images, order, photo_crops, pipeline, prepared, shards
from dip_jax.jobs import prepare
from dip_jax.models.dip import from_config
from dip_jax.runtime import sharding
from dip_jax.training import optim, state
from dip_jax.training.step import compile_train_step

WHAT = flags.DEFINE_enum("what", "read", ["read", "scale", "step"], "which benchmark")
IMAGES = flags.DEFINE_integer("images", 1000, "photographs for --what=read and step")
ROUNDS = flags.DEFINE_integer("rounds", 5, "how often --what=read and step take every figure, in turns")
RECORDS = flags.DEFINE_integer("records", 1_281_167, "records for --what=scale")
BATCHES = flags.DEFINE_integer("batches", 10_000, "batches of 256 for --what=scale")
STEPS = flags.DEFINE_integer("steps", 20, "steps at a time for --what=step")
BATCH = flags.DEFINE_integer("batch", None, "batch size for --what=step instead of the config's")
DATA = flags.DEFINE_string("data", "", "dataset directory for --what=step instead of photographs")
CONFIG = flags.DEFINE_string("config", "configs/demo.py", "config for --what=step")
OUT = flags.DEFINE_string("out", None, "folder of the results instead of benchmarks/results")
SIZE, SLICE = 256, 64  # pixels; images per turn


def cpu_seconds() -> float:
    """User and system time of this process and its living children."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def settle() -> float:
    """Waits until all that is read ahead has been read, every other thread asleep; the CPU time then, less its own."""
    began, quiet, own = time.thread_time(), 0, (str(os.getpid()), str(threading.get_native_id()))
    while quiet < 20:
        time.sleep(0.01)
        quiet = 0 if any(is_busy(task) for task in tasks() if (task.parent.parent.name, task.name) != own) else quiet + 1
    return cpu_seconds() - (time.thread_time() - began)


def tasks() -> Iterator[pathlib.Path]:
    """The threads of this process and its living children, in /proc."""
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        yield from pathlib.Path(f"/proc/{pid}/task").iterdir()


def is_busy(task: pathlib.Path) -> bool:
    """Whether a thread runs, waits for a core or for the disk: a busy machine makes nobody look idle."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD"
    except OSError:  # it has just ended
        return False


def make_photographs(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """JPEGs like ImageNet's: 500x375, some 80 KB, all different crops of the ten photographs."""
    rng = np.random.default_rng(0)
    photographs = [photo_crops.load_photograph(name) for name in photo_crops.PHOTOGRAPHS]
    files = []
    for i in range(count):
        source = photographs[i % len(photographs)]
        side = min(source.width / 4, source.height / 3) * rng.uniform(0.8, 1)
        left, top = rng.uniform(0, source.width - 4 * side), rng.uniform(0, source.height - 3 * side)
        image = source.resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + 4 * side, top + 3 * side))
        path = folder / f"class_{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=96)
        files.append(path)
    return files


def rate_of_pillow(files: list[pathlib.Path]) -> float:
    """Decode and ADM crop in a plain loop: what no pipeline with Pillow can beat."""
    started = cpu_seconds()
    for path in files:
        np.asarray(images.center_crop(Image.open(path).convert("RGB"), SIZE))
    return len(files) / (cpu_seconds() - started)


def rate_of_pipeline(stream: Iterator, count: int) -> float:
    """The host side of the pipeline: read, decode, crop, batch."""
    settle()  # what is read ahead is full now and when it ends: as much is read as is taken
    started = cpu_seconds()
    for _ in range(count // 16):
        next(stream)
    return count / (settle() - started)


def open_stream(folder: pathlib.Path, *, num_workers: int) -> Iterator:
    """Batches of 16, in their order of training; its threads and workers run."""
    data = config.Data(batch_size=16, num_workers=num_workers, num_threads=2)
    stream = iter(pipeline.host_batches(prepared.open_dataset(folder, image_size=SIZE), data, rows=range(16), seed=0))
    next(stream)
    return stream


def write_encodings(scratch: pathlib.Path, encodings: Sequence[str], size: int) -> dict[str, pathlib.Path]:
    """The photographs as a dataset in each encoding."""
    folders = {encoding: scratch / encoding for encoding in encodings}
    for encoding, folder in folders.items():
        stored = None if encoding == "original" else size
        prepare.prepare("folder", root=os.fspath(scratch / "photographs"), out=folder, image_size=stored, encoding=encoding)
    return folders


def read(scratch: pathlib.Path) -> list[dict]:
    """Rates of reading, per core; each beside Pillow's just before it, so that a busy machine slows both alike."""
    files = make_photographs(scratch / "photographs", IMAGES.value)
    streams = {}
    for encoding, folder in write_encodings(scratch, ("original", "jpeg", "webp", "png", "tiff", "raw"), SIZE).items():
        stored = sum(shard.bytes for shard in shards.read_info(folder).shards) / len(files)
        for workers in (0, 1, 2) if encoding == "original" else (0,):
            name = f"pipeline, {encoding} ({stored / 1024:.0f} KiB), {workers} workers"
            streams[name] = open_stream(folder, num_workers=workers)
    rates, alone = {name: [] for name in streams}, {name: [] for name in streams}
    for turn in range(ROUNDS.value):
        some = [files[(turn * SLICE + i) % len(files)] for i in range(SLICE)]
        for name, stream in streams.items():
            settle()
            alone[name].append(rate_of_pillow(some))
            rates[name].append(rate_of_pipeline(stream, SLICE))
    for stream in streams.values():
        stream.close()
    size = sum(path.stat().st_size for path in files) / len(files)
    ceiling = list(itertools.chain.from_iterable(alone.values()))
    rows = [read_row(f"Pillow alone, 500x375 -> {SIZE} ({size / 1024:.0f} KiB)", ceiling, ceiling)]
    return rows + [read_row(name, rates[name], alone[name]) for name in streams]


def read_row(name: str, rates: Sequence[float], alone: Sequence[float]) -> dict:
    """Medians and quartiles of the rates, and of their shares of Pillow's rate just before."""
    shares = sorted(rate / other for rate, other in zip(rates, alone, strict=True))
    quarter = len(shares) // 4
    rate, share = statistics.median(rates), statistics.median(shares)
    print(f"{name:50} {rate:7.0f} images/s/core {share:6.2f} x Pillow")
    return {
        "what": name,
        "images_per_core_second": round(rate, 1),
        "of_ceiling": round(share, 3),
        "of_ceiling_quartiles": [round(shares[quarter], 3), round(shares[-1 - quarter], 3)],
        "steps_per_second_at_batch_256_fed_by_16_cores": round(rate * 16 / 256, 1),
    }


def write_tiny(folder: pathlib.Path, count: int) -> None:
    """A dataset of 2x2 images in 2,048-record shards."""
    folder.mkdir()
    parts = [range(start, min(start + 2048, count)) for start in range(0, count, 2048)]
    written = [
        shards.write_shard(folder / f"train-{k:05d}.array_record", ((i % 1000, i.to_bytes(12, "little")) for i in part))
        for k, part in enumerate(parts)
    ]
    counts = tuple(len(range(k, count, 1000)) for k in range(1000))
    names = tuple(f"class_{k}" for k in range(1000))
    info = shards.DatasetInfo("benchmark", names, counts, image_size=2, encoding="raw", shards=tuple(written))
    (folder / shards.DATASET_FILE).write_text(info.to_json())


def scale(scratch: pathlib.Path) -> list[dict]:
    """Start-up, resume and memory with a million records."""
    write_tiny(scratch / "tiny", RECORDS.value)
    data = config.Data(batch_size=256)
    result = {"records": RECORDS.value, "shards": -(-RECORDS.value // 2048)}
    for key, start in (("start_seconds", 0), ("resume_at_700000_seconds", 700_000)):
        began = time.perf_counter()
        dataset = prepared.open_dataset(scratch / "tiny")
        stream = iter(pipeline.host_batches(dataset, data, rows=range(256), seed=0, start_step=start))
        batch = next(stream)
        result[key] = time.perf_counter() - began
        planned = order.batch_indices(len(dataset), batch_size=256, seed=0, step=start)
        assert [int.from_bytes(image.tobytes(), "little") for image in batch["image"]] == planned.tolist()
    memory, began = [], time.perf_counter()
    for k in range(BATCHES.value):
        next(stream)
        if k % max(BATCHES.value // 10, 1) == 0:
            memory.append(resident_mib())
    memory.append(resident_mib())
    result["batches_per_second"] = BATCHES.value / (time.perf_counter() - began)
    result["resident_mib_along_the_way"] = memory
    stream.close()
    print(json.dumps(result, indent=1))
    return [result]


def step(scratch: pathlib.Path) -> list[dict]:
    """Median step time with a constant batch and with real data, in turns, so that both see the same machine."""
    settings = config.from_config_dict(runpy.run_path(CONFIG.value)["get_config"]())
    data = dataclasses.replace(settings.data, batch_size=BATCH.value or settings.data.batch_size)
    datasets = list(open_datasets(scratch, settings.model.image_size[0]))
    num_classes = datasets[0].num_classes
    mesh = sharding.make_mesh(settings.mesh)
    with jax.set_mesh(mesh), sharding.use_rules(settings.mesh.rules):
        model = from_config(dataclasses.replace(settings.model, num_classes=num_classes))
        optimizer = optim.make_optimizer(settings.optim, total_steps=settings.train.steps)
        shardings = state.state_shardings(model, optimizer, mesh, zero1=settings.mesh.zero1)
        train_step = compile_train_step(model, optimizer, shardings, mesh, objective=settings.flow, optim=settings.optim)
        carry, key = state.init_sharded(model, optimizer, 0, shardings), jax.random.key(0)
        where = {"mesh": mesh, "image_size": settings.model.image_size, "num_classes": num_classes, "seed": 0}
        streams = {dataset.info.encoding: pipeline.batches(dataset, data, **where) for dataset in datasets}
        constant = itertools.repeat(next(next(iter(streams.values()))))
        seconds = {name: [] for name in ("constant", *streams)}

        def take_steps(name: str, count: int) -> None:
            nonlocal carry
            for _ in range(count):
                carry, metrics = train_step(carry, next(streams.get(name, constant)), key)
            jax.block_until_ready(metrics)

        for turn in range(ROUNDS.value + 1):
            for name, values in seconds.items():
                settle()
                if not measuring.on_cpu():  # what is read ahead by now must not hide that reading is too slow
                    take_steps(name, 4 * data.prefetch)
                cpu, wall = cpu_seconds(), time.perf_counter()
                take_steps(name, STEPS.value)
                wall = time.perf_counter() - wall
                if turn:  # the first compiles
                    values.append((settle() - cpu if measuring.on_cpu() else wall) / STEPS.value)
        for stream in streams.values():
            stream.close()
    return [step_row(name, values, seconds["constant"], batch=data.batch_size) for name, values in seconds.items()]


def open_datasets(scratch: pathlib.Path, size: int) -> Iterator[prepared.Dataset]:
    """The dataset that is asked for, or photographs in three encodings."""
    if DATA.value:
        folders = [DATA.value]
    else:
        make_photographs(scratch / "photographs", IMAGES.value)
        folders = write_encodings(scratch, ("original", "tiff", "raw"), size).values()
    for folder in folders:
        yield prepared.open_dataset(folder, image_size=size)


def step_row(name: str, values: Sequence[float], constant: Sequence[float], *, batch: int) -> dict:
    """What the step takes with this source, and how much more than with a constant batch in the same round."""
    slower = sorted(value / alone - 1 for value, alone in zip(values, constant, strict=True))
    row = {"source": name, "batch": batch, "milliseconds": round(1e3 * statistics.median(values), 2)}
    row |= {"slower_by": round(statistics.median(slower), 4), "low_high": [round(slower[0], 4), round(slower[-1], 4)]}
    print(f"{name:10} {row['milliseconds']:9.2f} ms per step of {batch} images, {100 * row['slower_by']:+.1f} %")
    return row


def resident_mib() -> float:
    """Resident memory of this process now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main(_) -> None:
    """Runs one benchmark and writes its result."""
    scratch = pathlib.Path(tempfile.mkdtemp())
    try:
        rows = {"read": read, "scale": scale, "step": step}[WHAT.value](scratch)
    finally:
        shutil.rmtree(scratch)
    settings = {flag.name: flag.value for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]] if flag.name != "out"}
    out = pathlib.Path(OUT.value) / f"data_{WHAT.value}.json" if OUT.value else None
    measuring.save(f"data_{WHAT.value}", {**settings, "pillow": PIL.__version__}, rows, out=out)


if __name__ == "__main__":
    app.run(main)
