"""Make a dataset directory: ArrayRecord shards of images with labels, and dataset.json.

Examples:
  python -m dip_jax prepare --source=photo_crops --out=DATASET_DIR
  python -m dip_jax prepare --source=folder --from=imagenet/train --image_size=256 --out=DATASET_DIR
  python -m dip_jax prepare --source=folder --from=imagenet/train --encoding=original --out=DATASET_DIR
  python -m dip_jax prepare --source=tfds:cifar10 --image_size=32 --out=DATASET_DIR

The directory appears when it is complete; until then the work lies in OUT.partial, and the same command goes on from there.
A source with several splits makes OUT/train, OUT/validation, each a dataset directory.
"""

import collections
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass

import PIL
from absl import flags as absl_flags
from tqdm import tqdm

from dip_jax.data import images, shards, sources, workers
from dip_jax.errors import Exit, Interrupted, UserError

REJECTED_FILE = "rejected.csv"
RECORDS_PER_SHARD = 2048  # what a kill costs per process, at most


@dataclass(frozen=True)
class Storing:
    """How images are stored."""

    encoding: str
    image_size: int | None  # None with encoding "original"
    quality: int  # of jpeg


@dataclass(frozen=True)
class Summary:
    """What `prepare` made.

    Attributes:
        records: by split.
        rejected: (split, name, reason) of every image that was left out.
    """

    records: dict[str, int]
    rejected: list[tuple[str, str, str]]


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    absl_flags.DEFINE_string("source", None, "folder, photo_crops, or tfds:NAME", flag_values=flags, required=True)
    absl_flags.DEFINE_string("from", "", "folder to read; for tfds:NAME the TFDS data_dir", flag_values=flags)
    absl_flags.DEFINE_string("out", None, "dataset directory to make", flag_values=flags, required=True)
    absl_flags.DEFINE_integer("image_size", None, "side of the centre crop that is stored, pixels", flag_values=flags)
    absl_flags.DEFINE_enum(
        "encoding",
        None,
        images.ENCODINGS,
        "original (bytes as they are, cropped when read), or crops as raw pixels, png, webp (lossless) or jpeg; "
        "default: raw for photo_crops, png for the others",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer("quality", 95, "of jpeg crops", lower_bound=1, upper_bound=100, flag_values=flags)
    absl_flags.DEFINE_float(
        "max_rejected", 0.001, "share of bad images above which the exit code is 3", 0.0, 1.0, flag_values=flags
    )
    absl_flags.DEFINE_integer("processes", None, "how many write; default: one per CPU", lower_bound=1, flag_values=flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    summary = prepare(
        flags.source,
        root=flags["from"].value,
        out=flags.out,
        image_size=flags.image_size,
        encoding=flags.encoding,
        quality=flags.quality,
        processes=flags.processes,
        max_rejected=flags.max_rejected,
    )
    kept, lost = sum(summary.records.values()), len(summary.rejected)
    print(f"{flags.out}: {', '.join(f'{n} {split}' for split, n in summary.records.items())} images")
    if lost:
        print(f"{lost} of {kept + lost} images were rejected: {flags.out}/{REJECTED_FILE} lists them")


def prepare(
    source: str,
    *,
    out: str | os.PathLike,
    root: str = "",
    image_size: int | None = None,
    encoding: str | None = None,
    quality: int = 95,
    processes: int | None = None,
    max_rejected: float = 0.001,
) -> Summary:
    """Makes the dataset directory `out`, or goes on where a killed call stopped; the result is the same to the byte.

    Args:
        source: a row of `sources.SOURCES`, "tfds:NAME" for a TFDS dataset.
        out: appears when it is complete; `out`.partial holds unfinished work.
        root: what --from says.
        image_size, encoding: None is the source's own.
        quality: of jpeg crops.
        processes: how many write; None is one per CPU.
        max_rejected: share of bad images above which `out` does not appear.

    Raises:
        UserError: for arguments that do not fit together, or an `out` that is another dataset.
        Interrupted: with `Exit.REJECTED_INPUTS`, if more images are bad than `max_rejected` allows.
    """
    kind, _, argument = source.partition(":")
    row = _source_row(kind)
    storing = _storing(row, encoding=encoding, image_size=image_size, quality=quality)
    out = pathlib.Path(out).expanduser().absolute()
    origin = f"{source} --from={root}" if root else source
    if out.exists():
        return _existing(out, origin=origin, storing=storing)
    partial = out.with_name(out.name + ".partial")
    with _locked(partial):
        splits = row.open(argument, root, storing.image_size, partial / "scratch")
        _check_request(partial, origin=origin, splits=splits, storing=storing)
        tasks = list(_plan(partial, splits, storing))
        _write_all(tasks, processes=processes or len(os.sched_getaffinity(0)))
        summary = _finish(partial, tasks, splits, origin=origin, storing=storing)
        total = sum(summary.records.values()) + len(summary.rejected)
        if len(summary.rejected) > max_rejected * total:
            raise Interrupted(_rejection(partial, summary, total=total, max_rejected=max_rejected), code=Exit.REJECTED_INPUTS)
        os.rename(partial / "dataset", out)
        shutil.rmtree(partial)
    return summary


def _source_row(kind: str) -> sources.Source:
    if kind not in sources.SOURCES:
        nearest = difflib.get_close_matches(kind, sources.SOURCES, n=1, cutoff=0.0)[0]
        raise UserError(f"--source={kind} is unknown: it is one of {', '.join(sources.SOURCES)}; did you mean {nearest!r}?")
    return sources.SOURCES[kind]


def _storing(row: sources.Source, *, encoding: str | None, image_size: int | None, quality: int) -> Storing:
    encoding = encoding or row.encoding
    if encoding == "original":
        return Storing(encoding, row.image_size, quality)
    image_size = image_size or row.image_size
    if image_size is None:
        raise UserError(f"--encoding={encoding} stores crops: say their side with --image_size=N, or use --encoding=original")
    if image_size < 1:
        raise UserError(f"--image_size={image_size} must be positive")
    return Storing(encoding, image_size, quality)


def _existing(out: pathlib.Path, *, origin: str, storing: Storing) -> Summary:
    """The summary of a dataset that is there already, if it is the one that is asked for."""
    folders = [f.parent for f in sorted((*out.glob(shards.DATASET_FILE), *out.glob(f"*/{shards.DATASET_FILE}")))]
    infos = {folder.name: shards.read_info(folder) for folder in folders}
    wanted = (origin, storing.encoding, storing.image_size)
    if not infos or any((info.source, info.encoding, info.image_size) != wanted for info in infos.values()):
        raise UserError(f"--out={out} exists and is not this dataset: choose another directory or remove it")
    return Summary({split: info.num_records for split, info in infos.items()}, [])


@contextlib.contextmanager
def _locked(partial: pathlib.Path) -> Iterator[None]:
    """Holds the unfinished work against a second `prepare`."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")  # noqa: SIM115 (used below, outside this try)
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}; choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{partial} is being written by another prepare: wait for it, or choose another --out") from None
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.strerror}: {error.filename or partial}; then run the same command to go on") from error


def _check_request(partial: pathlib.Path, *, origin: str, splits: Mapping[str, sources.Split], storing: Storing) -> None:
    """Refuses to mix finished shards of another request with this one's."""
    request = {
        "source": origin,
        "content": {name: split.identity for name, split in splits.items()},
        "records_per_shard": RECORDS_PER_SHARD,
        "pillow": PIL.__version__,
        **dataclasses.asdict(storing),
    }
    file = partial / "request.json"
    if file.exists():
        before = json.loads(file.read_text())
        for key, value in request.items():
            if before.get(key) != value:
                raise UserError(
                    f"{partial} is unfinished work with {key}={before.get(key)} where now {key}={value}: "
                    "remove it to start afresh, or repeat the command that began it"
                )
    else:
        _write_atomically(file, json.dumps(request, indent=1))


def _write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@dataclass(frozen=True)
class _Task:
    """One shard to write, in a process of its own choosing."""

    split_name: str
    split: sources.Split
    start: int
    stop: int
    path: pathlib.Path
    done: pathlib.Path  # its report, written last: there when the shard is finished
    storing: Storing


@dataclass(frozen=True)
class _Report:
    shard: shards.Shard
    class_counts: list[int]
    rejected: list[tuple[str, str]]


def _plan(partial: pathlib.Path, splits: Mapping[str, sources.Split], storing: Storing) -> Iterator[_Task]:
    for name, split in splits.items():
        folder = partial / "dataset" / (name if len(splits) > 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (partial / "done" / name).mkdir(parents=True, exist_ok=True)
        count = math.ceil(len(split) / RECORDS_PER_SHARD)
        for k in range(count):
            file = f"{name}-{k:05d}-of-{count:05d}.array_record"
            start, stop = k * len(split) // count, (k + 1) * len(split) // count
            yield _Task(name, split, start, stop, folder / file, partial / "done" / name / f"{file}.json", storing)


def _write_all(tasks: list[_Task], *, processes: int) -> None:
    """Writes the shards that are not finished yet, with a progress line."""
    todo = [task for task in tasks if not task.done.exists()]
    total, pending = (sum(task.stop - task.start for task in some) for some in (tasks, todo))
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with (
        tqdm(total=total, initial=total - pending, unit="image", desc="prepare") as bar,
        futures.ProcessPoolExecutor(min(processes, len(todo)), context, _start_worker, (counter,)) as pool,
    ):
        running = {pool.submit(_write_shard, task) for task in todo}
        while running:
            finished, running = futures.wait(running, timeout=0.5, return_when=futures.FIRST_EXCEPTION)
            bar.update(total - pending + counter.value - bar.n)
            try:
                for future in finished:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _start_worker(counter) -> None:
    global _counter
    _counter = counter
    workers.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, about odd metadata


def _write_shard(task: _Task) -> None:
    counts, rejected = [0] * len(task.split.classes), []

    def records() -> Iterator[tuple[int, bytes]]:
        for i in range(task.start, task.stop):
            item = task.split[i]
            try:
                stored = _store(item, task.storing, num_classes=len(counts))
            except images.BadImageError as error:
                rejected.append((item.name, str(error)))
            else:
                counts[item.label] += 1
                yield item.label, stored
            with _counter.get_lock():
                _counter.value += 1

    temporary = task.path.with_name(task.path.name + ".tmp")
    shard = dataclasses.replace(shards.write_shard(temporary, records()), file=task.path.name)
    os.replace(temporary, task.path)
    _write_atomically(task.done, json.dumps(dataclasses.asdict(_Report(shard, counts, rejected))))


def _store(item: sources.Item, storing: Storing, *, num_classes: int) -> bytes:
    if not 0 <= item.label < num_classes:
        raise images.BadImageError(f"label {item.label} is outside [0, {num_classes})")
    image = images.decode(item.data)
    if storing.encoding == "original":
        return item.data
    return images.encode(images.center_crop(image, storing.image_size), storing.encoding, quality=storing.quality)


def _finish(
    partial: pathlib.Path, tasks: list[_Task], splits: Mapping[str, sources.Split], *, origin: str, storing: Storing
) -> Summary:
    """Writes dataset.json of each split, and rejected.csv, from the shards' reports."""
    records, rejected = {}, []
    for name, split in splits.items():
        own = [task for task in tasks if task.split_name == name]
        reports = [json.loads(task.done.read_text()) for task in own]
        info = shards.DatasetInfo(
            source=origin,
            classes=tuple(split.classes),
            class_counts=tuple(map(sum, zip(*(report["class_counts"] for report in reports), strict=True))),
            image_size=None if storing.encoding == "original" else storing.image_size,
            encoding=storing.encoding,
            shards=tuple(shards.Shard(**report["shard"]) for report in reports),
        )
        _write_atomically(own[0].path.parent / shards.DATASET_FILE, info.to_json())
        records[name] = info.num_records
        rejected += [(name, *pair) for report in reports for pair in report["rejected"]]
    if rejected:
        with open(partial / "dataset" / REJECTED_FILE, "w", newline="") as file:
            csv.writer(file).writerows([("split", "image", "reason"), *rejected])
    return Summary(records, rejected)


def _rejection(partial: pathlib.Path, summary: Summary, *, total: int, max_rejected: float) -> str:
    reasons = collections.Counter(reason for _, _, reason in summary.rejected).most_common(1)
    return (
        f"{len(summary.rejected)} of {total} images are bad, more than --max_rejected={max_rejected} "
        f"(most often: {reasons[0][0]}): {partial / 'dataset' / REJECTED_FILE} lists them; accept the loss by a higher "
        f"--max_rejected, or repair the source and remove {partial}"
    )
