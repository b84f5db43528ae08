"""What a run tells: metric tables, TensorBoard, images, and a progress line.

`metrics.jsonl` holds one row per logged step and is the truth; `metrics.csv` has the same rows. A run that goes on from step s
drops the rows after s that the interrupted run had already written, so that no step is missing and none appears twice.
"""

import contextlib
import csv
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dip_jax.config import Config, to_dict
from dip_jax.runtime import storage, trackers

Row = dict[str, Any]


class Table:
    """Rows `{"step": k, ...}` in `NAME.jsonl` and `NAME.csv`, ascending by step.

    Args:
        path: the files' common name, without ending.
        resume_step: rows after it are dropped, as is a last line that a kill cut short.
    """

    def __init__(self, path: epath.Path, *, resume_step: int):
        self._jsonl = path.parent / f"{path.name}.jsonl"
        self._csv = path.parent / f"{path.name}.csv"
        rows = [row for row in read_rows(self._jsonl) if row["step"] <= resume_step]
        storage.write_text(self._jsonl, "".join(_line(row) for row in rows))
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        storage.write_text(self._csv, _csv_text(rows, self._columns))
        self._local = storage.is_local(self._jsonl)
        self._rows = [] if self._local else rows

    def add(self, row: Row) -> None:
        """Appends one row to both files; it survives a kill of the process from here on."""
        new = [key for key in row if key not in self._columns]
        if not self._local:  # a bucket has no append: the whole table goes up again
            self._rows.append(row)
            self._columns += new
            storage.write_text(self._jsonl, "".join(_line(each) for each in self._rows))
            storage.write_text(self._csv, _csv_text(self._rows, self._columns))
            return
        with open(self._jsonl, "a", encoding="utf-8") as file:
            file.write(_line(row))
        if new:
            self._columns += new
            storage.write_text(self._csv, _csv_text(read_rows(self._jsonl), self._columns))
            return
        with open(self._csv, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)


def read_rows(path: epath.PathLike) -> list[Row]:
    """Rows of a `.jsonl` table; empty where the file is missing. A line that a kill cut short is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if columns:
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def image_path(workdir: epath.Path, step: int, name: str) -> epath.Path:
    """Where `Writer.image` puts a picture."""
    return workdir / "images" / f"{name}_{step:08d}.png"


class Writer:
    """The tables, TensorBoard events and images of one workdir, and a tracker's. Only one process has one.

    Args:
        workdir: `metrics.jsonl`, `metrics.csv`, `eval.jsonl`, `images/` and `tensorboard/` go there.
        resume_step: the step that training goes on from.
        config: of the run, for the tracker that it names, if any.

    Raises:
        UserError: if the tracker does not begin.
    """

    def __init__(self, workdir: epath.Path, *, resume_step: int = 0, config: Config | None = None):
        self._workdir = workdir
        self._tracker = None
        if config is not None and config.train.tracker:
            logged = max((row["step"] for row in read_rows(workdir / "metrics.jsonl")), default=0)
            self._tracker = trackers.Tracker(config.train.tracker, workdir, to_dict(config), logged=logged)
        self._tables = {name: Table(workdir / name, resume_step=resume_step) for name in ("metrics", "eval")}
        self._events = None
        if storage.is_local(workdir):  # tensorboardX appends, which a bucket cannot
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1, flush_secs=10)

    def scalars(self, step: int, values: Mapping[str, float | int | np.number], *, table: str = "metrics") -> None:
        """One row of a table ("metrics" or "eval"), and the same numbers to TensorBoard. Once per step and table.

        A number that is not finite becomes null, which JSON has a word for.
        """
        values = {key: float(value) if np.isfinite(value) else None for key, value in values.items()}
        self._tables[table].add({"step": step, **values})
        if self._tracker is not None:
            self._tracker.scalars(step, values, table=table)
        if self._events is not None:
            for key in values.keys() - {key for key, value in values.items() if value is None}:
                self._events.add_scalar(f"{table}/{key}", values[key], step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> epath.Path:
        """Writes `images/NAME_STEP.png` (uint8 [H, W, 3]), shows it in TensorBoard, and returns the file's path."""
        path = image_path(self._workdir, step, name)
        path.parent.mkdir(exist_ok=True)
        data = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(data, "PNG")
        storage.write_bytes(path, data.getvalue())
        if self._tracker is not None:
            self._tracker.image(step, name, np.asarray(pixels))
        if self._events is not None:
            self._events.add_image(name, np.asarray(pixels), step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flushes TensorBoard as far as the disk lets us: the numbers are in the tables, and a save tells of a full disk."""
        if self._tracker is not None:
            self._tracker.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


LINE_SECONDS = 10.0  # between two progress lines where stderr is no terminal


def progress_rhythm() -> str:
    """How often `Progress` tells, in words: a step that has no line is not a lost one."""
    return "a bar" if sys.stderr.isatty() else f"a line every {LINE_SECONDS:.0f} s"


class Progress:
    """One line with loss, gradient norm, speed and the time left: a bar on a terminal, a line now and then elsewhere.

    Args:
        total: steps of the whole run.
        start: steps done before.
    """

    def __init__(self, *, total: int, start: int):
        self._total = total
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._shown = -float("inf")
        self._speed: Mapping[str, float] = {}

    def note(self, speed: Mapping[str, float]) -> None:
        """What was last measured, as `training.pace` has it: every later line tells it. Nothing changes where it is empty."""
        self._speed = speed or self._speed

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a finished step; `values` has loss and grad_norm."""
        text = "  ".join([f"loss {values['loss']:.4f}", f"grad_norm {values['grad_norm']:.3f}", *self._speed_words()])
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._shown >= LINE_SECONDS or step == self._total:
            self._shown = time.monotonic()
            left = f"  {duration((self._total - step) * self._speed['seconds_per_step'])} left" if self._speed else ""
            print(f"step {step}/{self._total}  {text}{left}", file=sys.stderr, flush=True)

    def _speed_words(self) -> list[str]:
        if not self._speed:
            return []
        mfu = [f"MFU {self._speed['mfu']:.1%}"] if "mfu" in self._speed else []
        rate, seconds = self._speed["images_per_second"], self._speed["seconds_per_step"]
        return [
            f"{rate:,.{0 if rate >= 10 else 2}f} images/s",
            f"{seconds:.3g} s/step",
            f"data wait {self._speed['data_wait']:.0%}",
            *mfu,
        ]

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Such as 4m05s or 7h09m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
