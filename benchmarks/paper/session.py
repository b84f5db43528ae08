"""What the experiments share while they run: runs that go on where they stopped, a budget of minutes, the time left."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.paper.scale import Scale
from dip_jax.config import Config, difference, from_dict
from dip_jax.data import images, photo_crops
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.jobs import prepare, train


class Session:
    """One call of `python -m benchmarks.paper`.

    Args:
        scale: how large.
        out: where CSV and PNG files go.
        work: where datasets and runs are kept; a run that is finished there is not trained again.
        minutes: training stops, saved, when they are over; the same command goes on.
        teacher: the user's file of DINOv2, where there is one.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        out: pathlib.Path,
        work: pathlib.Path,
        minutes: float,
        teacher: pathlib.Path | None = None,
    ):
        self.scale, self.out, self.work, self.teacher = scale, out, work, teacher
        self._started = time.monotonic()
        self._deadline = self._started + 60 * minutes
        self._done, self._total, self._busy = 0, 0, 0.0

    def expect(self, runs: int) -> None:
        """How many runs the experiment has, for the time left."""
        self._total = runs

    def run(self, name: str, config: Config, measure: Callable[[pathlib.Path], Any]) -> Any:
        """Trains `config` in its own workdir, then measures it: JSON values, kept beside the checkpoint.

        Raises:
            Interrupted: when the budget is over (85) or by Ctrl-C (130), after saving.
        """
        workdir = self.work / name
        began = time.monotonic()

        def train_and_measure() -> Any:
            with self._limited():
                train.train(config, workdir=workdir)
            return measure(workdir)

        kept = workdir / f"{measure.__name__}.json"
        new = not kept.exists()
        if not new:
            _require_same(config, workdir)
        found = self.once(kept, train_and_measure)
        self._busy += time.monotonic() - began if new else 0.0
        self._done += 1
        self._tell(name, new=self._busy > 0)
        return found

    def once(self, kept: pathlib.Path, compute: Callable[[], Any]) -> Any:
        """JSON values that are computed where the file `kept` is missing, and read from it ever after."""
        if not kept.exists():
            values = json.dumps(compute())
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(values + "\n")
        return json.loads(kept.read_text())

    def photo_crops(self) -> pathlib.Path:
        """The ten photographs, prepared at 64x64."""
        out = self.work.parent / "photo_crops"
        prepare.prepare("photo_crops", out=out, image_size=64)
        return out

    def photograph(self) -> pathlib.Path:
        """A dataset of the one photograph of Figure 3."""
        size = self.scale.photograph_size
        folder = self.work.parent / f"photograph_{size}"
        file = folder / "images" / "chelsea" / "chelsea.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            images.center_crop(photo_crops.load_photograph("chelsea"), size).save(file)
        prepare.prepare("folder", root=os.fspath(folder / "images"), out=folder / "dataset", image_size=size, processes=1)
        return folder / "dataset"

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Asks the training inside to save and stop when the budget is over, as a scheduler would."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Interrupted(
                f"the budget is over, {self._done} of {self._total} runs are done: the same command goes on",
                code=Exit.PREEMPTED,
            )
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a warning that comes too early or too late ends nothing
        timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            signal.signal(signal.SIGUSR1, before)

    def _tell(self, name: str, *, new: bool) -> None:
        spent = (time.monotonic() - self._started) / 60
        left = f", about {self._busy / self._done / 60 * (self._total - self._done):.1f} min left" if new else ""
        print(f"[{self._done}/{self._total}] {name}: {spent:.1f} min spent{left}", file=sys.stderr, flush=True)


def _require_same(config: Config, workdir: pathlib.Path) -> None:
    """Values that are kept are those of this config, or an error says what differs."""
    before = from_dict(json.loads((workdir / "config.json").read_text()))
    changed = [line for line in difference(before, config) if not line.startswith("data.path")]
    if changed:
        raise UserError(f"{workdir} holds a run of another config ({'; '.join(changed)}): choose another --work, or remove it")
