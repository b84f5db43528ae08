"""Where a run's hours go: the wall time since a workdir's first start, divided without remainder among its parts.

One clock runs in exactly one part at a time (`Ledger.enter`), so that the parts of a start add up to its length; what lies
between two starts is "stopped". `WORKDIR/goodput.json` holds a record per start and is written anew every second by a thread
(every 30 s in a bucket), whatever the run is busy with: a kill loses no more than that, and the next start puts the time from
there on to "stopped".

`steps` is the share that is wanted (Google's "goodput"), all else is what it cost. The steps between the last checkpoint and a
kill are done twice: the first time they count as `steps`, the second as `again`.
"""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.runtime import storage

PARTS = {  # what time goes to, and how it is called for a reader
    "steps": "productive steps",
    "start_up": "start-up: devices, data, model, restoring",
    "compiling": "compiling, with the first step of a start",
    "data": "waiting for data",
    "saving": "saving",
    "showing": "sampling and evaluation",
    "profiling": "writing profiles",
    "again": "steps done again after a restart",
    "stopped": "stopped between two starts",
}
COLUMNS = {part: "goodput" if part == "steps" else f"lost_{part}" for part in PARTS}  # of a table, as shares of the wall time
_FILE = "goodput.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the training command.

    Attributes:
        began, last: seconds since 1970; the last sign of life.
        origin, step: the step that it went on from, and the last one that it did.
        seconds: by part, all but "stopped"; they add up to last - began.
        exit: the code that it ended with; None while it runs and where it was killed.
        host: where it ran.
    """

    began: float
    last: float
    origin: int
    step: int
    seconds: Mapping[str, float]
    exit: int | None = None
    host: str = ""

    def runs(self, now: float, *, local: bool) -> bool:
        """Whether it seems to be going on: it has not ended, and gave a sign of life a moment ago."""
        return self.exit is None and now - self.last < 10 * _period(local)


def _period(local: bool) -> float:
    return 1.0 if local else 30.0


def read_starts(workdir: epath.Path) -> list[Start]:
    """All starts of a workdir, the oldest first; those of before a file that cannot be read are forgotten."""
    try:
        return [Start(**row) for row in json.loads((workdir / _FILE).read_text())["starts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def divide(starts: Sequence[Start]) -> dict[str, float]:
    """Seconds by part, from the first start to the last sign of life; they add up to that time."""
    found = dict.fromkeys(PARTS, 0.0)
    for before, start in zip((None, *starts), starts, strict=False):
        for name, seconds in start.seconds.items():
            found[name] += seconds
        found["stopped"] += max(start.began - before.last, 0.0) if before else 0.0  # a host's clock may be behind
    return found


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """`divide` as columns of a table: `wall_seconds`, and `COLUMNS`; the shares add up to 1."""
    total = sum(seconds.values())
    return {"wall_seconds": total} | {COLUMNS[part]: seconds[part] / total if total else 0.0 for part in PARTS}


class Ledger:
    """The clock of one start. Its parts may be entered by one thread only.

    Args:
        workdir: None keeps nothing, for processes other than the main one.
        began: when the start began, by `time.monotonic`.
    """

    def __init__(self, workdir: epath.Path | None, *, began: float):
        self._workdir = workdir
        self._past = read_starts(workdir) if workdir else []
        self._furthest = max((start.step for start in self._past), default=0)
        self._part, self._seconds = "start_up", dict.fromkeys(PARTS.keys() - {"stopped"}, 0.0)
        self._since = self._zero = began
        self._began = time.time() - (time.monotonic() - began)
        self._origin, self._step = None, 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="goodput")
        if workdir:
            self._thread.start()

    def enter(self, part: str) -> None:
        """From now on time goes to this part."""
        with self._lock:
            self._turn()
            self._part = part

    def at(self, step: int, *, compiling: bool) -> None:
        """So many steps are done, and the next one begins; `compiling`: it is the first of this start."""
        self._origin = step if self._origin is None else self._origin
        self._step, self._furthest = step, max(step, self._furthest)
        self.enter("compiling" if compiling else "again" if step < self._furthest else "steps")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block goes to this part, what follows to the part before."""
        before = self._part
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, part: str) -> None:
        """The last `seconds` were this part's, as is known only now."""
        with self._lock:
            self._turn()
            self._seconds[self._part] -= seconds
            self._seconds[part] += seconds

    def shares(self) -> dict[str, float]:
        """`shares` of the whole run up to now."""
        return shares(divide([*self._past, self._now(exit=None)]))

    def _turn(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._since = now

    def _now(self, *, exit: int | None) -> Start:
        with self._lock:
            self._turn()
            last = self._began + self._since - self._zero
            step = max(self._step, self._origin or 0)
            return Start(self._began, last, self._origin or 0, step, dict(self._seconds), exit, socket.gethostname())

    def _write(self, *, exit: int | None = None) -> None:
        """A workdir that is no run yet (no config.json) gets no trace of a start that may come to nothing."""
        with contextlib.suppress(Exception):  # a full disk or a store that is away: a save will say so
            if (self._workdir / "config.json").exists():
                rows = [dataclasses.asdict(start) for start in (*self._past, self._now(exit=exit))]
                storage.write_text(self._workdir / _FILE, json.dumps({"starts": rows}, separators=(",", ":")))

    def _keep(self) -> None:
        while not self._ended.wait(_period(storage.is_local(self._workdir))):
            self._write()

    def close(self, code: int) -> None:
        """Ends the clock with the exit code of the start."""
        if self._workdir:
            self._ended.set()
            self._thread.join()
            self._write(exit=int(code))


@contextlib.contextmanager
def recording(workdir: epath.Path | None, *, began: float) -> Iterator[Ledger]:
    """A ledger (see there) that notes how the block ends."""
    ledger, code = Ledger(workdir, began=began), Exit.CRASH
    try:
        yield ledger
        code = Exit.DONE
    except Interrupted as stop:
        code = stop.code
        raise
    except UserError:
        code = Exit.USER_ERROR
        raise
    finally:
        ledger.close(code)


def read_rows(starts: Sequence[Start], now: float, *, local: bool) -> list[dict[str, Any]]:
    """A row per start, for a table: when, from which step to which, how long, and how it ended."""
    return [
        {
            "start": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start.began)),
            "from step": start.origin,
            "to step": start.step,
            "seconds": round(start.last - start.began, 1),
            "exit": "runs" if start.runs(now, local=local) else "killed" if start.exit is None else str(start.exit),
            "host": start.host,
        }
        for start in starts
    ]
