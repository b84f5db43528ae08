"""What `prepare` says at its end: what there is, what was left out, what to type next."""

import collections
import os
import pathlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from dip_jax.data import shards, writing
from dip_jax.data.sources.split import count
from dip_jax.errors import UserError

PREVIEW_FILE = "preview.png"


@dataclass(frozen=True)
class Summary:
    """What `prepare` made.

    Attributes:
        records: by split.
        rejected: (split, name, reason) of every image that was left out.
        notes: what else there is to know of the source, a line each; none of a dataset that was there already.
    """

    records: dict[str, int]
    rejected: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)


def check_limit(max_rejected: float | int) -> None:
    """Raises `UserError` where it is neither a share nor a number of images."""
    if max_rejected < 0 or (max_rejected >= 1 and max_rejected != int(max_rejected)):
        raise UserError(f"--max_rejected={max_rejected} must be a share below 1, or a whole number of images")


def too_many(rejected: int, *, total: int, max_rejected: float | int) -> bool:
    """Whether more images are bad than a share (below 1) or a number (from 1) allows."""
    return rejected > (max_rejected if max_rejected >= 1 else max_rejected * total)


def rejection(folder: pathlib.Path, summary: Summary, *, max_rejected: float | int) -> str:
    """The line for too many bad images; `folder` is the unfinished work."""
    rejected = summary.rejected
    reason, _ = collections.Counter(reason for _, _, reason in rejected).most_common(1)[0]
    return (
        f"{len(rejected)} of {sum(summary.records.values()) + len(rejected)} images are bad, more than "
        f"--max_rejected={max_rejected:g} (the first: {rejected[0][1]}: {rejected[0][2]}; most often: {reason}): "
        f"{folder / 'dataset' / writing.REJECTED_FILE} lists them; accept the loss by a higher --max_rejected (a share, or a "
        f"number of images), or repair the source and remove {folder}"
    )


def turned_note(turned: int, *, exif: str) -> list[str]:
    """What was done about EXIF's orientation, where an image carries one."""
    if not turned:
        return []
    if exif == "rotate":
        return [f"EXIF: {count(turned, 'image')} turned upright"]
    verb = "carries" if turned == 1 else "carry"
    return [f"EXIF: {count(turned, 'image')} {verb} a rotation, which is ignored as ADM does; --exif=rotate turns one's own"]


def lines(out: str, summary: Summary) -> list[str]:
    """For people, about the finished dataset `out`."""
    folder = shards.find_dataset(out)
    info = shards.read_info(folder)
    kept, lost = sum(summary.records.values()), len(summary.rejected)
    size = "original bytes, cropped when read" if info.image_size is None else f"{info.image_size}x{info.image_size} pixels"
    found = [
        f"{out}: {', '.join(f'{n} {split}' for split, n in summary.records.items())} images",
        f"{count(len(info.classes), 'class')}: {_counts(info.classes, info.class_counts)}",
        f"stored: {info.encoding}, {size}",
        *summary.notes,
    ]
    if lost:
        _, name, reason = summary.rejected[0]
        listed = f"{out}/{writing.REJECTED_FILE} lists them"
        found.append(f"{lost} of {kept + lost} images were rejected, the first {name} ({reason}): {listed}")
    return [*found, f"a look at it: {os.path.relpath(folder / PREVIEW_FILE)}", f"next: {next_command(out, info)}"]


def _counts(classes: Sequence[str], counts: Sequence[int]) -> str:
    """The fewest and the most images of a class."""
    few, many = (pick(range(len(counts)), key=counts.__getitem__) for pick in (min, max))
    if counts[few] == counts[many]:
        return f"{count(counts[few], 'image')} each"
    return f"fewest {counts[few]} ({classes[few]}), most {counts[many]} ({classes[many]})"


def next_command(out: str, info: shards.DatasetInfo) -> str:
    """The training command for this dataset."""
    words = ["python", "-m", "dip_jax", "train", "--config=configs/dip.py:S", f"--workdir=runs/{pathlib.Path(out).name}"]
    words += [f"--config.data.path={out}", f"--config.model.num_classes={len(info.classes)}"]
    words.append("--config.repa.weight=0")  # the alignment needs its teacher's weights, which a newcomer has not
    if info.image_size not in (None, 256):
        words.append(f"--config.model.image_size=({info.image_size},{info.image_size})")
    return shlex.join(words)
