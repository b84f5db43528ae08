"""Writes the shards of a dataset in several processes, each shard once, whatever is killed in between.

A shard is written under a temporary name, renamed, and then reported in a file of its own: what has a report is finished.
"""

import csv
import dataclasses
import errno
import json
import math
import multiprocessing
import os
import pathlib
import signal
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass

from tqdm import tqdm

from dip_jax.data import images, shards, sources, unfinished, workers
from dip_jax.errors import UserError

REJECTED_FILE = "rejected.csv"
RECORDS_PER_SHARD = 2048  # what a kill costs per process, at most
_GRACE = 1.0  # seconds: a signal to a whole job may reach the writers first, and is then told as what it is


@dataclass(frozen=True)
class Storing:
    """How images are stored."""

    encoding: str
    image_size: int | None  # None with encoding "original"
    quality: int  # of jpeg
    exif: str = "ignore"  # row of images.EXIF


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    split_name: str
    part: sources.Split  # the records of this shard
    path: pathlib.Path
    report: pathlib.Path  # written last: there when the shard is finished
    storing: Storing


@dataclass(frozen=True)
class Report:
    """What became of a task; `rejected` holds (name, reason), `turned` counts images that EXIF says to turn."""

    shard: shards.Shard
    class_counts: list[int]
    rejected: list[tuple[str, str]]
    turned: int


@dataclass(frozen=True)
class Finished:
    """What became of all tasks.

    Attributes:
        records: by split.
        rejected: (split, name, reason) of each image that was left out.
        turned: stored images that EXIF says to turn.
    """

    records: dict[str, int]
    rejected: list[tuple[str, str, str]]
    turned: int


def plan(folder: pathlib.Path, splits: Mapping[str, sources.Split], storing: Storing) -> list[Task]:
    """The shards of these splits: files in folder/dataset (below it, a folder per split if there are several)."""
    tasks = []
    for name, split in splits.items():
        target = folder / "dataset" / (name if len(splits) > 1 else "")
        reports = folder / "reports" / name
        for new in (target, reports):
            new.mkdir(parents=True, exist_ok=True)
        count = math.ceil(len(split) / RECORDS_PER_SHARD)
        for k in range(count):
            file = f"{name}-{k:05d}-of-{count:05d}.array_record"
            part = split.part(k * len(split) // count, (k + 1) * len(split) // count)
            tasks.append(Task(name, part, target / file, reports / f"{file}.json", storing))
    return tasks


def write_all(tasks: list[Task], *, processes: int, shown: bool = True) -> None:
    """Writes the shards that are not finished yet, with a progress line if `shown`.

    Raises:
        UserError: if a process was killed or could not start.
        OSError: if an image cannot be read or a shard not written.
    """
    todo = [task for task in tasks if not task.report.exists()]
    if not todo:
        return
    total, pending = (sum(len(task.part) for task in some) for some in (tasks, todo))
    context = _Context()
    counter, stop = context.Value("q", 0), context.Event()
    with (
        tqdm(total=total, initial=total - pending, unit="image", desc="prepare", smoothing=0.02, disable=not shown) as bar,
        futures.ProcessPoolExecutor(min(processes, len(todo)), context, _start_worker, (counter, stop)) as pool,
    ):
        running = {pool.submit(_write_shard, task) for task in todo}
        try:
            while running:
                finished, running = futures.wait(running, timeout=0.5, return_when=futures.FIRST_EXCEPTION)
                bar.update(total - pending + counter.value - bar.n)
                for future in finished:
                    future.result()
        except futures.process.BrokenProcessPool:
            time.sleep(_GRACE)
            raise UserError(_reason({process.exitcode for process in context.started})) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Context(multiprocessing.context.SpawnContext):
    """Starts processes and keeps them: a pool does not say how its own ended."""

    def __init__(self):
        super().__init__()
        self.started: list[multiprocessing.context.SpawnProcess] = []

    def Process(self, *args, **kwargs):  # the name that pools call
        self.started.append(super().Process(*args, **kwargs))
        return self.started[-1]


def _reason(codes: set[int | None]) -> str:
    """Why a pool broke, by the exit codes of its processes; those that it ended itself have SIGTERM's."""
    if workers.UNGUARDED in codes:
        return workers.GUARD
    failed = sorted(code for code in codes if code is not None and code > 0)
    if failed:
        return f"a writing process ended with exit code {failed[0]}: what it printed above says why"
    return "a writing process was killed (out of memory?): use fewer --processes and run it again"


def _start_worker(counter, stop) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    workers.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, about odd metadata


def _write_shard(task: Task) -> None:
    counts, rejected, turned = [0] * len(task.part.classes), [], 0

    def records() -> Iterator[tuple[int, bytes]]:
        nonlocal turned
        for i in range(len(task.part)):
            if _stop.is_set():
                raise InterruptedError(errno.EINTR, "stopped")
            item = task.part[i]
            try:
                stored, orientation = _store(item, task.storing, num_classes=len(counts))
            except images.BadImageError as error:
                rejected.append((item.name, str(error)))
            else:
                counts[item.label] += 1
                turned += orientation != 1
                yield item.label, stored
            with _counter.get_lock():
                _counter.value += 1

    # A name of its own, outside the dataset: of hosts that were killed, one may still be writing the same shard.
    temporary = task.report.with_name(f"{task.path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    shard = dataclasses.replace(shards.write_shard(temporary, records()), file=task.path.name)
    os.replace(temporary, task.path)
    unfinished.write_atomically(task.report, json.dumps(dataclasses.asdict(Report(shard, counts, rejected, turned))))


def sweep(partial: pathlib.Path) -> None:
    """Removes the shards that killed writers had begun; before anybody writes."""
    for file in (partial / "reports").glob("*/*.tmp"):
        file.unlink(missing_ok=True)


def _store(item: sources.Item, storing: Storing, *, num_classes: int) -> tuple[bytes, int]:
    """What a record keeps of an image, and the image's EXIF orientation."""
    if item.problem:
        raise images.BadImageError(item.problem)
    if not 0 <= item.label < num_classes:
        raise images.BadImageError(f"label {item.label} is outside [0, {num_classes})")
    image = images.load(item.data)
    orientation = images.orientation(image)
    if storing.exif == "rotate":
        image = images.turn(image)
    image = images.to_rgb(image)
    if storing.encoding == "original":
        return item.data, orientation
    stored = images.encode(images.center_crop(image, storing.image_size), storing.encoding, quality=storing.quality)
    return stored, orientation


def finish(folder: pathlib.Path, tasks: list[Task], *, source: str) -> Finished:
    """Writes each split's dataset.json, and rejected.csv, from the reports."""
    records, rejected, turned = {}, [], 0
    for name in dict.fromkeys(task.split_name for task in tasks):
        own = [task for task in tasks if task.split_name == name]
        reports = [json.loads(task.report.read_text()) for task in own]
        info = shards.DatasetInfo(
            source=source,
            classes=tuple(own[0].part.classes),
            class_counts=tuple(map(sum, zip(*(report["class_counts"] for report in reports), strict=True))),
            image_size=own[0].storing.image_size,
            encoding=own[0].storing.encoding,
            exif=own[0].storing.exif,
            shards=tuple(shards.Shard(**report["shard"]) for report in reports),
        )
        unfinished.write_atomically(own[0].path.parent / shards.DATASET_FILE, info.to_json())
        records[name] = info.num_records
        rejected += [(name, *pair) for report in reports for pair in report["rejected"]]
        turned += sum(report["turned"] for report in reports)
    if rejected:
        with open(folder / "dataset" / REJECTED_FILE, "w", newline="") as file:
            csv.writer(file).writerows([("split", "image", "reason"), *rejected])
    return Finished(records, rejected, turned)
