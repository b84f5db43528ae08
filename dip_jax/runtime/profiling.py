"""Profiles of some steps, asked for before a run or while it goes on: XProf traces, from every process, in the workdir.

`WORKDIR/profiles/plugins/profile/step_N/HOST.xplane.pb` is where XProf looks for the hosts of one profile:

    xprof --logdir=WORKDIR/profiles        (pip install xprof)

A trace is made in a folder of this host and then copied, so that the workdir may be a bucket. Whatever goes wrong with it is a
line on stderr; the run goes on.
"""

import glob
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable

import jax
from etils import epath

from dip_jax.errors import reason
from dip_jax.runtime import distributed

REQUEST = "profile"  # a file of this name in the workdir asks for one
STEPS = 5  # of a profile that is asked for while the run goes on


class Profiler:
    """Traces the steps that a config names, and some more whenever the file `profile` is there or SIGUSR2 came.

    Args:
        workdir: of the run.
        planned: (first, last): from when `first` steps are done until `last` are; (0, 0) plans none.
        every: at multiples of so many steps it is looked whether somebody asked; a run of several processes agrees there.
        heard: whether a signal asked for a profile since the last call.
    """

    def __init__(self, workdir: epath.Path, *, planned: tuple[int, int], every: int, heard: Callable[[], bool]):
        self._workdir, self._every, self._heard = workdir, every, heard
        self._windows = [planned, (0, 0)]  # the second is what was asked for
        self._folder: str | None = None  # of the trace under way
        self._begun, self._failed = 0, False

    def due(self, step: int) -> bool:
        """Whether `turn` has something to do when so many steps are done. All processes must call it, at every step.

        When they talk to each other depends on the windows alone, which all share, not on what went wrong in one of them.
        """
        busy = any(first <= step <= last > 0 for first, last in self._windows)
        if step % self._every == 0 and not busy and self._somebody_asked():
            self._windows[1] = (step, step + STEPS)
        inside = any(first <= step < last for first, last in self._windows)
        self._failed &= inside
        return not self._failed and inside == (self._folder is None)

    def turn(self, step: int) -> None:
        """Begins a trace or ends it. What is to be in it must be done, and nothing under way that is not."""
        try:
            self._begin(step) if self._folder is None else self._end(step)
        except Exception as error:  # another profiler is at work, a device has none, the disk is full
            self._folder, self._failed = None, True
            print(f"no profile at step {step} by process {distributed.index()}: {reason(error)}", file=sys.stderr, flush=True)

    def close(self, step: int) -> None:
        """Ends a trace under way and keeps what it has."""
        if self._folder is not None:
            self.turn(step)

    def _somebody_asked(self) -> bool:
        path = self._workdir / REQUEST
        here = self._heard() or (distributed.is_main() and path.exists())
        if not distributed.largest(int(here)):
            return False
        if distributed.is_main():
            path.unlink(missing_ok=True)
        return True

    def _begin(self, step: int) -> None:
        folder = tempfile.mkdtemp(prefix="dip_jax_profile_")
        jax.profiler.start_trace(folder)
        self._folder, self._begun = folder, step

    def _end(self, step: int) -> None:
        folder, self._folder = self._folder, None
        try:
            jax.profiler.stop_trace()
            target = self._workdir / "profiles" / "plugins" / "profile" / f"step_{self._begun:08d}"
            target.mkdir(parents=True, exist_ok=True)
            for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
                name = f"{socket.gethostname()}-{distributed.index()}.xplane.pb"
                (target / name).write_bytes(epath.Path(path).read_bytes())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        viewer = f"xprof --logdir={os.fspath(self._workdir / 'profiles')}"
        distributed.say(f"profile of steps {self._begun + 1} to {step}; to open it: pip install xprof; {viewer}")
