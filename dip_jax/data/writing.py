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
from typing import Any

from tqdm import tqdm

from dip_jax.data import images, shards, sources, workers
from dip_jax.errors import UserError

REJECTED_FILE = "rejected.csv"
_REQUEST_FILE = "request.json"  # what is asked of unfinished work
RECORDS_PER_SHARD = 2048  # what a kill costs per process, at most
_GRACE = 1.0  # seconds: a signal to a whole job may reach the writers first, and is then told as what it is


@dataclass(frozen=True)
class Storing:
    """How images are stored."""

    encoding: str
    image_size: int | None  # None with encoding "original"
    quality: int  # of jpeg


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
    """What became of a task; `rejected` holds (name, reason)."""

    shard: shards.Shard
    class_counts: list[int]
    rejected: list[tuple[str, str]]


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all, also after a kill."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_request(folder: pathlib.Path) -> dict[str, Any] | None:
    """What was asked of the unfinished work in `folder`; None where there is none.

    Raises:
        UserError: if the file that says it is damaged.
    """
    file = folder / _REQUEST_FILE
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}): remove {folder} to start afresh") from None


def note_request(folder: pathlib.Path, *, asked: Mapping[str, Any]) -> None:
    """Notes what is asked of new work in `folder`, or refuses to mix finished shards of another request with it.

    Raises:
        UserError: with the key and both values.
    """
    before = read_request(folder)
    if before is None:
        write_atomically(folder / _REQUEST_FILE, json.dumps(asked, indent=1))
        return
    for key, value in asked.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder} is unfinished work with {key}={before.get(key)} where now {key}={value}: "
                "remove it to start afresh, or repeat the command that began it"
            )


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
        UserError: if a process was killed.
        OSError: if an image cannot be read or a shard not written.
    """
    todo = [task for task in tasks if not task.report.exists()]
    if not todo:
        return
    total, pending = (sum(len(task.part) for task in some) for some in (tasks, todo))
    context = multiprocessing.get_context("spawn")
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
            raise UserError("a writing process was killed (out of memory?): use fewer --processes and run it again") from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(counter, stop) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    workers.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, about odd metadata


def _write_shard(task: Task) -> None:
    counts, rejected = [0] * len(task.part.classes), []

    def records() -> Iterator[tuple[int, bytes]]:
        for i in range(len(task.part)):
            if _stop.is_set():
                raise InterruptedError(errno.EINTR, "stopped")
            item = task.part[i]
            try:
                stored = _store(item, task.storing, num_classes=len(counts))
            except images.BadImageError as error:
                rejected.append((item.name, str(error)))
            else:
                counts[item.label] += 1
                yield item.label, stored
            with _counter.get_lock():
                _counter.value += 1

    # A name of its own, outside the dataset: of hosts that were killed, one may still be writing the same shard.
    temporary = task.report.with_name(f"{task.path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    shard = dataclasses.replace(shards.write_shard(temporary, records()), file=task.path.name)
    os.replace(temporary, task.path)
    write_atomically(task.report, json.dumps(dataclasses.asdict(Report(shard, counts, rejected))))


def sweep(partial: pathlib.Path) -> None:
    """Removes the shards that killed writers had begun; before anybody writes."""
    for file in (partial / "reports").glob("*/*.tmp"):
        file.unlink(missing_ok=True)


def _store(item: sources.Item, storing: Storing, *, num_classes: int) -> bytes:
    if not 0 <= item.label < num_classes:
        raise images.BadImageError(f"label {item.label} is outside [0, {num_classes})")
    image = images.decode(item.data)
    if storing.encoding == "original":
        return item.data
    return images.encode(images.center_crop(image, storing.image_size), storing.encoding, quality=storing.quality)


def finish(folder: pathlib.Path, tasks: list[Task], *, source: str) -> tuple[dict[str, int], list[tuple[str, str, str]]]:
    """Writes each split's dataset.json, and rejected.csv, from the reports.

    Returns:
        records by split; (split, name, reason) of each rejected image.
    """
    records, rejected = {}, []
    for name in dict.fromkeys(task.split_name for task in tasks):
        own = [task for task in tasks if task.split_name == name]
        reports = [json.loads(task.report.read_text()) for task in own]
        info = shards.DatasetInfo(
            source=source,
            classes=tuple(own[0].part.classes),
            class_counts=tuple(map(sum, zip(*(report["class_counts"] for report in reports), strict=True))),
            image_size=own[0].storing.image_size,
            encoding=own[0].storing.encoding,
            shards=tuple(shards.Shard(**report["shard"]) for report in reports),
        )
        write_atomically(own[0].path.parent / shards.DATASET_FILE, info.to_json())
        records[name] = info.num_records
        rejected += [(name, *pair) for report in reports for pair in report["rejected"]]
    if rejected:
        with open(folder / "dataset" / REJECTED_FILE, "w", newline="") as file:
            csv.writer(file).writerows([("split", "image", "reason"), *rejected])
    return records, rejected
