"""Alignment on and off: the same runs with and without a teacher beside the flow loss, the user's or a random one."""

import dataclasses
import math
import pathlib
import zlib

import numpy as np
import safetensors.numpy

from benchmarks.paper import measure, plots, seeds, tables
from benchmarks.paper.scale import photo_crops_config
from benchmarks.paper.session import Session
from benchmarks.paper.table2 import METRICS, run_name
from dip_jax.config import Config, Repa
from dip_jax.models import dinov2

QUALITY, VERDICTS = "repa.csv", "repa_verdicts.csv"
RANDOM = dinov2.DinoV2(width=192, depth=4)
HEADS = ("none", "unet")
WEIGHTS = {"without": 0.0, "with": 0.5}


def random_teacher(path: pathlib.Path) -> pathlib.Path:
    """A file of a small DINOv2 with random weights, as at its own start: its tokens know the patch and nothing of the world."""
    if not path.exists():
        tensors = {}
        for name, shape in dinov2.tensor_shapes(RANDOM).items():
            random = np.random.RandomState(zlib.crc32(name.encode()))
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
                tensors[name] = np.ones(shape, np.float32)
            elif name.endswith("bias"):
                tensors[name] = np.zeros(shape, np.float32)
            else:
                tensors[name] = (random.standard_normal(shape) / math.sqrt(np.prod(shape[1:]))).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, path)
    return path


def compute(session: Session) -> None:
    """Trains with and without alignment, DiT-only and the U-Net, with all seeds; writes the rows of every finished run."""
    data, scale = session.photo_crops(), session.scale
    encoder = session.teacher or random_teacher(session.work.parent / "random_dinov2.safetensors")
    kind = "given" if session.teacher else "random"
    session.expect(len(HEADS) * len(WEIGHTS) * len(scale.seeds))

    def settings(head: str, weight: float, *, seed: int) -> Config:
        base = photo_crops_config(scale, seed=seed, data=str(data / "train"), head=head)
        if not weight:
            return base
        layer = math.ceil(base.model.depth / 3)  # 8 of 26 blocks in the paper's recipe
        return dataclasses.replace(base, repa=Repa(weight=weight, encoder=str(encoder), layer=layer))

    def quality(workdir: pathlib.Path) -> dict:
        return measure.quality(workdir, scale, data)

    rows = []
    for seed in scale.seeds:
        for head in HEADS:
            for name, weight in WEIGHTS.items():
                run = run_name({"head": head} | ({"repa": kind} if weight else {}), seed=seed)
                found = session.run(run, settings(head, weight, seed=seed), quality)
                row = {"teacher": kind, "head": head, "alignment": name, "seed": seed, "steps": scale.steps}
                rows.append(row | found)
                tables.write(session.out / QUALITY, rows)
                tables.write(session.out / VERDICTS, verdicts(rows))


def verdicts(rows: list[dict]) -> list[dict]:
    """With against without, by head and metric, with the same seed."""
    found = []
    for (head,), group in plots.by(rows, "head").items():
        for metric in METRICS:
            values = {(row["alignment"], row["seed"]): row[metric] for row in group}
            pairs = [values["with", seed] - values["without", seed] for way, seed in values if way == "with"]
            mean = sum(pairs) / len(pairs) if pairs else math.nan
            found.append({"head": head, "metric": metric, "difference": mean, "with": seeds.judge(pairs)})
    return found


def plot(out: pathlib.Path) -> None:
    """A row per head and way, a column per metric; a dot per seed."""
    rows = tables.read(out / QUALITY)
    groups = plots.by(rows, "head", "alignment")
    names = [f"{'U-Net' if head == 'unet' else 'DiT-only'}, {way}" for head, way in groups]
    made = plots.figure(9, 3)
    for axis, (metric, title) in zip(made.subplots(1, len(METRICS), sharey=True), METRICS.items(), strict=True):
        title = f"{title}, {rows[0]['teacher']} teacher"
        plots.dots(axis, names, [[row[metric] for row in each] for each in groups.values()], title=title, x="lower is better")
    plots.save(made, out / "repa.png")
