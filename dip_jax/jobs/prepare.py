"""Make a dataset directory: ArrayRecord shards of images with labels, and dataset.json.

Examples:
  python -m dip_jax prepare --source=photo_crops --out=DATASET_DIR
  python -m dip_jax prepare --source=folder --from=imagenet/train --image_size=256 --out=DATASET_DIR
  python -m dip_jax prepare --source=folder --from=imagenet/train --encoding=original --out=DATASET_DIR
  python -m dip_jax prepare --source=csv --from=labels.csv --image_size=256 --out=DATASET_DIR
  python -m dip_jax prepare --source=zip --from=photos.zip --image_size=256 --exif=rotate --out=DATASET_DIR
  python -m dip_jax prepare --source=parquet --from=imagenet-1k/data --image_size=256 --out=DATASET_DIR
  python -m dip_jax prepare --source=webdataset --from=imagenet-1k-wds --image_size=256 --out=DATASET_DIR
  python -m dip_jax prepare --source=imagenet_tar --from=ILSVRC2012_img_train.tar --image_size=256 --out=DATASET_DIR
  python -m dip_jax prepare --source=tfds:cifar10 --image_size=32 --out=DATASET_DIR

The directory appears when it is complete; until then the work lies in OUT.partial, and the same command goes on from there, on
any number of hosts that share OUT's folder: each writes its part of the shards, and the result is the same to the byte.
A source with several splits makes OUT/train, OUT/validation, each a dataset directory.
"""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import PIL
from absl import flags as absl_flags
from etils import epath

from dip_jax.data import images, shards, sources, summary, unfinished, workers, writing
from dip_jax.data.sources.split import identity
from dip_jax.data.summary import Summary
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.reporting import preview
from dip_jax.runtime import command_line, distributed, storage
from dip_jax.runtime.signals import stopping_at_once

_QUALITY = 95  # of jpeg crops


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    absl_flags.DEFINE_string(
        "source",
        None,
        "folder (a sub-folder per class), csv (a table file,label), zip, parquet (Hugging Face's; parquet:COLUMN names the "
        "label), webdataset (tars), imagenet_tar (the tar of tars as it is), tfds:NAME, or photo_crops",
        flag_values=flags,
        required=True,
    )
    absl_flags.DEFINE_string("from", "", "folder or file to read; for tfds:NAME the TFDS data_dir", flag_values=flags)
    absl_flags.DEFINE_string("out", None, "dataset directory to make", flag_values=flags, required=True)
    absl_flags.DEFINE_integer("image_size", None, "side of the centre crop that is stored, pixels", flag_values=flags)
    absl_flags.DEFINE_enum(
        "encoding",
        None,
        images.ENCODINGS,
        "original (bytes as they are, cropped when read), or crops as raw pixels, tiff, png or webp (lossless), or jpeg; "
        "default: raw for photo_crops, tiff for the others",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer("quality", None, "of jpeg crops; default: 95", lower_bound=1, upper_bound=100, flag_values=flags)
    absl_flags.DEFINE_enum(
        "exif",
        "ignore",
        images.EXIF,
        "a rotation in a photograph's EXIF: ignore, as ADM does for published sets, or rotate, for photographs of one's own",
        flag_values=flags,
    )
    absl_flags.DEFINE_float(
        "max_rejected",
        0.001,
        "bad images above which the exit code is 3: a share below 1, or a number of images",
        0.0,
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "processes", None, "how many write on each host; default: one per CPU", lower_bound=1, flag_values=flags
    )
    command_line.define_processes(flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    storage.require_folder_name(flags.out, flag="--out")
    distributed.start(computes=False)
    with stopping_at_once():
        made = prepare(
            flags.source,
            root=flags["from"].value,
            out=flags.out,
            image_size=flags.image_size,
            encoding=flags.encoding,
            quality=flags.quality,
            exif=flags.exif,
            processes=flags.processes,
            max_rejected=flags.max_rejected,
        )
    if made is not None:
        print("\n".join(summary.lines(flags.out, made)))


def prepare(
    source: str,
    *,
    out: str | os.PathLike,
    root: str = "",
    image_size: int | None = None,
    encoding: str | None = None,
    quality: int | None = None,
    exif: str = "ignore",
    processes: int | None = None,
    max_rejected: float | int = 0.001,
) -> Summary | None:
    """Makes the dataset directory `out`, or goes on where a killed call stopped; the result is the same to the byte.

    Of several processes (see `distributed.start`) all write shards; the first alone decides, and makes `out` appear.

    Args:
        source: a row of `sources.SOURCES`, "tfds:NAME" for a TFDS dataset.
        out: appears when it is complete; `out`.partial holds unfinished work.
        root: what --from says.
        image_size, encoding, quality, exif: as the flags; None is the source's own, and 95 of the quality.
        processes: how many write on this host; None is one per CPU.
        max_rejected: bad images above which `out` does not appear: a share below 1, or a number of images.

    Returns:
        In the main process; None in the others.

    Raises:
        UserError: for arguments that do not fit together, or an `out` that is another dataset.
        Interrupted: with `Exit.REJECTED_INPUTS`, if more images are bad than `max_rejected` allows.
    """
    workers.end_if_unguarded()
    asked = {"source": source, "from": root, "out": os.fspath(out), "image_size": image_size, "encoding": encoding}
    asked |= {"quality": quality, "exif": exif, "max_rejected": max_rejected, "code": distributed.code_version()}
    distributed.require_same(asked)
    summary.check_limit(max_rejected)
    row, argument = _source_row(source)
    out = pathlib.Path(out).expanduser().absolute()
    partial = out.parent / f"{out.name}.partial"

    @_explained(partial)
    def decide() -> writing.Storing:
        begun = _begun_as(out, partial)
        stored = encoding or (None if begun == "original" and image_size is not None else begun)
        return _storing(row, encoding=stored, image_size=image_size, quality=quality, exif=exif)

    storing = distributed.on_all(decide)
    origin = f"{source} --from={root}" if root else source
    if distributed.agree(int(out.exists())):
        return distributed.on_main(lambda: _existing(out, origin=origin, storing=storing))

    @_explained(partial)
    def open_source() -> Mapping[str, sources.Split]:
        return row.open(argument, root, storing.image_size, partial / "scratch")

    @_explained(partial)
    def note() -> None:
        unfinished.note(partial, asked=wanted, splits=splits)

    @_explained(partial)
    def plan() -> list[writing.Task]:
        return writing.plan(partial, splits, storing)

    @_explained(partial)
    def write() -> None:
        own = tasks[distributed.index() :: distributed.count()]
        writing.write_all(own, processes=processes or len(os.sched_getaffinity(0)), shown=distributed.is_main())

    with _explained(partial), contextlib.ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(unfinished.locked(partial)))
        distributed.require_shared(epath.Path(partial), flag="--out")
        built = distributed.on_main(open_source)  # alone, as it may have to build the source
        splits = distributed.on_all(lambda: built or open_source())
        wanted = _request(origin, splits, storing)
        distributed.require_same(wanted)
        distributed.on_main(lambda: (note(), writing.sweep(partial)))
        tasks = distributed.on_all(plan)
        distributed.on_all(write)
        notes = [note for split in splits.values() for note in split.notes]
        return distributed.on_main(lambda: _publish(partial, out, tasks, origin=origin, notes=notes, max_rejected=max_rejected))


def _source_row(source: str) -> tuple[sources.Source, str]:
    """The row that --source names, and what follows the colon."""
    kind, _, argument = source.partition(":")
    if kind not in sources.SOURCES:
        nearest = difflib.get_close_matches(kind, sources.SOURCES, n=1, cutoff=0.0)[0]
        raise UserError(f"--source={kind} is unknown: it is one of {', '.join(sources.SOURCES)}; did you mean {nearest!r}?")
    return sources.SOURCES[kind], argument


def _storing(
    row: sources.Source, *, encoding: str | None, image_size: int | None, quality: int | None, exif: str
) -> writing.Storing:
    encoding = encoding or row.encoding
    images.require_codec(encoding)
    if image_size is not None and image_size < 1:
        raise UserError(f"--image_size={image_size} must be positive")
    if quality is not None and encoding != "jpeg":
        raise UserError(f"--quality={quality} is of jpeg crops, and these are {encoding}: leave it out, or use --encoding=jpeg")
    if exif not in images.EXIF:
        raise UserError(f"exif={exif!r} is one of {', '.join(images.EXIF)}")
    if encoding == "original":
        if exif == "rotate":
            raise UserError("--exif=rotate turns crops, but --encoding=original stores the bytes as they are: choose one")
        if image_size is not None:
            raise UserError(
                f"--image_size={image_size} is the side of stored crops, but --encoding=original stores the bytes as they are, "
                "cropped when they are read: leave one of them out"
            )
        return writing.Storing(encoding, None, quality or _QUALITY)
    image_size = image_size or row.image_size
    if image_size is None:
        raise UserError(f"--encoding={encoding} stores crops: say their side with --image_size=N, or use --encoding=original")
    return writing.Storing(encoding, image_size, quality or _QUALITY, exif)


def _dataset_files(out: pathlib.Path) -> list[pathlib.Path]:
    return sorted((*out.glob(shards.DATASET_FILE), *out.glob(f"*/{shards.DATASET_FILE}")))


def _begun_as(out: pathlib.Path, partial: pathlib.Path) -> str | None:
    """The encoding of what is there already, so that repeating a command needs no more than the command."""
    if files := _dataset_files(out):
        return shards.read_info(files[0].parent).encoding
    return (unfinished.read(partial) or {}).get("encoding")


def _existing(out: pathlib.Path, *, origin: str, storing: writing.Storing) -> Summary:
    """The summary of a dataset that is there already, if it is the one that is asked for."""
    folders = [file.parent for file in _dataset_files(out)]
    if not folders:
        raise UserError(f"--out={out} exists and is no dataset: choose another directory or remove it")
    infos = {info.shards[0].file.partition("-")[0]: info for info in map(shards.read_info, folders)}
    wanted = {"source": origin, "encoding": storing.encoding, "image_size": storing.image_size, "exif": storing.exif}
    for key, value in wanted.items():
        for info in infos.values():
            if getattr(info, key) != value:
                raise UserError(
                    f"--out={out} exists with {key}={getattr(info, key)} where {value} is asked: choose another directory, or "
                    "ask for what is there"
                )
    return Summary({split: info.num_records for split, info in infos.items()}, [])


@contextlib.contextmanager
def _explained(partial: pathlib.Path) -> Iterator[None]:
    """What the disk or Ctrl-C ends is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror}: {error.filename or partial}; then run the same command to go on") from error
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; finished shards lie in {partial}: the same command goes on", code=Exit.INTERRUPTED
        ) from None


def _request(origin: str, splits: Mapping[str, sources.Split], storing: writing.Storing) -> dict[str, Any]:
    """Everything that the shards depend on, as JSON values."""
    return {
        "source": origin,
        "content": {name: identity(split) for name, split in splits.items()},
        "pillow": PIL.__version__,
        **dataclasses.asdict(storing),
    }


def _publish(
    partial: pathlib.Path,
    out: pathlib.Path,
    tasks: list[writing.Task],
    *,
    origin: str,
    notes: list[str],
    max_rejected: float | int,
) -> Summary:
    """Makes `out` of finished shards, unless too many images are bad."""
    with _explained(partial):
        finished = writing.finish(partial, tasks, source=origin)
        notes = notes + summary.turned_note(finished.turned, exif=tasks[0].storing.exif)
        made = Summary(finished.records, finished.rejected, notes)
        lost, total = len(made.rejected), sum(made.records.values()) + len(made.rejected)
        if summary.too_many(lost, total=total, max_rejected=max_rejected):
            line = summary.rejection(partial, made, max_rejected=max_rejected)
            raise Interrupted(line, code=Exit.REJECTED_INPUTS)
        for file in _dataset_files(partial / "dataset"):
            preview.write(file.parent / summary.PREVIEW_FILE)
        os.rename(partial / "dataset", out)
    shutil.rmtree(partial, ignore_errors=True)
    return made
