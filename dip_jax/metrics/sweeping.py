"""The points of a sweep drawn and judged, so that a killed one goes on where it stopped and ends with the same numbers.

OUT/results.json             what is known of every point: its first quarter's metrics, its row
OUT/drawing/POINT/000012     raw pixels of batch 12 of a point that is not judged to its end
"""

import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from dip_jax.checkpoints import averages, checkpoint, manifest
from dip_jax.errors import UserError
from dip_jax.metrics import sweep
from dip_jax.metrics.image_sets import ImageSet
from dip_jax.metrics.judge import Judge
from dip_jax.metrics.sweep import Point, Row
from dip_jax.runtime import distributed, storage, writers
from dip_jax.sampling import sampler, trajectories
from dip_jax.sampling.labels import interleave


@dataclass(frozen=True)
class Task:
    """So many samples of a point with a seed, under a name."""

    name: str
    point: Point
    seed: int
    count: int

    @property
    def size(self) -> int:
        """Images of a batch."""
        return self.point.options.batch_size

    @property
    def work(self) -> int:
        """Network evaluations."""
        return self.count * sum(sampler.nfe(self.point.options))


class Bench:
    """Draws points of one checkpoint and judges them.

    Args:
        out: folder for what is known and what is half done.
        judge: puts numbers on images.
        step: the step directory.
        guide: a weaker model in the place of the unconditional half (autoguidance).
    """

    def __init__(self, out: epath.Path, judge: Judge, *, step: epath.Path, guide: trajectories.Weaker | None = None):
        self.out, self._judge, self._step, self._guide = out, judge, step, guide
        self.notes: list[str] = []
        self._loaded: tuple[str, Any, Any] | None = None
        model = checkpoint.read_record(step).config.model
        self._classes, self._shape = model.num_classes, (*model.image_size, 3)

    @functools.cached_property
    def _known(self) -> dict[str, dict[str, Any]]:
        file = self.out / "results.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _keep(self, name: str, **found: Any) -> None:
        """Adds to what is known of a point, on the disk too."""
        self._known[name] = {**self._known.get(name, {}), **found}
        storage.write_text(self.out / "results.json", json.dumps(self._known, indent=1) + "\n")

    def rows(self, tasks: Sequence[Task], *, cut: float) -> dict[str, Row]:
        """The rows of all tasks by name, in their order; with `cut` those that are clearly worse are cut short (`sweep`)."""
        missing = [task for task in tasks if "row" not in self._known.get(task.name, {})]
        distributed.say(f"{len(tasks)} points, {len(tasks) - len(missing)} of them done")
        clock, left = _Clock(sum(task.work for task in missing)), sum(task.work for task in missing)
        for number, task in enumerate(tasks):
            if task not in missing:
                continue
            before = [self._known[other.name]["first"] for other in tasks[:number] if "first" in self._known[other.name]]
            row = self._measure(task, before, cut=cut, clock=clock)
            fid = sweep.fid_name(row)
            told = f"{number + 1}/{len(tasks)} {task.name}: {fid} {row[fid]:.4g}{' (cut short)' * bool(row['cut'])}"
            left -= task.work
            clock.say(f"{told}; {writers.duration(clock.seconds(left))} left at most")
        clock.close()
        notes = [note for task in tasks for note in self._known[task.name]["notes"]]
        self.notes = list(dict.fromkeys(notes))
        return {task.name: self._known[task.name]["row"] for task in tasks}

    def _measure(self, task: Task, before: Sequence[float], *, cut: float, clock: "_Clock") -> Row:
        """Draws a point to its end, or to that of its first quarter, and keeps its row."""
        labels = interleave(range(self._classes), task.count)
        first = sweep.first_part(task.count, task.size) if cut else task.count
        seen = {"seed": task.seed, "step": self._step.name}
        folder = self.out / "drawing" / task.name
        is_cut = False
        if first < task.count:
            if "first" not in self._known.get(task.name, {}):
                part = self._drawn(task, labels[:first], labels, folder, clock)
                verdict = self._judge(part)
                found = {"metrics": verdict.metrics, "notes": verdict.notes}
                self._keep(task.name, first=verdict.metrics[sweep.fid_name(verdict.metrics)], quarter=found)
            is_cut = sweep.is_cut(self._known[task.name]["first"], before, cut=cut)
        if is_cut:
            found, judged = self._known[task.name]["quarter"], labels[:first]
        else:
            verdict = self._judge(self._drawn(task, labels, labels, folder, clock))
            found, judged = {"metrics": verdict.metrics, "notes": verdict.notes}, labels
        row = sweep.row(task.point, judged, found["metrics"], **seen, cut=is_cut)
        self._keep(task.name, row=row, notes=found["notes"])
        if folder.exists():
            folder.rmtree()
        return row

    def _drawn(self, task: Task, wanted: np.ndarray, labels: np.ndarray, folder: epath.Path, clock: "_Clock") -> ImageSet:
        """The first so many images of a task, in files; drawn where they are not there yet."""
        batches = range(-(-len(wanted) // task.size))
        todo = [batch for batch in batches if not (folder / f"{batch:06d}").exists()]
        if todo:
            folder.mkdir(parents=True, exist_ok=True)
            storage.require_space(folder, len(todo) * task.size * int(np.prod(self._shape)))
            model, params = self._load(task.point.weights)
            arguments = {"labels": labels, "seed": task.seed, "options": task.point.options, "only": todo, "guide": self._guide}
            for batch, images in trajectories.draw_batches(model, params, **arguments):
                storage.write_bytes(folder / f"{batch:06d}", images.tobytes())
                clock.done(len(images) * task.work // task.count)

        def read(size: int) -> Iterator[np.ndarray]:
            for batch in batches:
                pixels = np.frombuffer((folder / f"{batch:06d}").read_bytes(), np.uint8).reshape(-1, *self._shape)
                for start in range(0, len(pixels), size):
                    yield pixels[start : start + size]

        return ImageSet("samples", len(wanted), self._shape, read, wanted)

    def _load(self, weights: str) -> tuple[Any, Any]:
        """The model and one average; the one before is let go first."""
        if self._loaded is None or self._loaded[0] != weights:
            self._loaded = None
            if fault := manifest.damage(self._step, unread=averages.UNREAD[weights]):
                raise UserError(f"{self._step} is damaged ({fault}): use another step of the same workdir")
            self._loaded = (weights, *checkpoint.load(self._step, weights=weights, verify=False))
        return self._loaded[1:]


class _Clock:
    """A bar on a terminal, and how long the rest will take at the pace since the start."""

    def __init__(self, work: int):
        self._done, self._started = 0, time.monotonic()
        self._bar = tqdm(total=work, unit=" evaluations", unit_scale=True) if sys.stderr.isatty() and work else None

    def done(self, work: int) -> None:
        self._done += work
        if self._bar is not None:
            self._bar.update(work)

    def seconds(self, work: int) -> float:
        """How long so much more will take."""
        return work * (time.monotonic() - self._started) / max(self._done, 1)

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr) if self._bar is not None else distributed.say(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
