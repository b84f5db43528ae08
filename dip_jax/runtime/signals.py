"""Signals as requests that a job answers at a moment of its choosing."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from dip_jax.errors import Exit


class Signals:
    """Turns signals into a request that the loop reads between two steps.

    SIGTERM and SIGUSR1 (a scheduler's warning) ask for `Exit.PREEMPTED`, Ctrl-C for `Exit.INTERRUPTED`. A second Ctrl-C ends
    the process at once, which is safe: a checkpoint exists whole or not at all. SIGUSR2 asks for a profile.

    Args:
        shared: for a run of several processes. SIGTERM is left to JAX's preemption service, which tells the other processes
            (see `distributed.preempted`), and the other two signals are passed on to it.

    Example:
        >>> with Signals() as signals:
        ...     while signals.requested is None: step()
    """

    def __init__(self, *, shared: bool = False):
        self.requested: Exit | None = None
        self._profile = False
        self._shared = shared
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGUSR1, signal.SIGINT, *(() if self._shared else (signal.SIGTERM,))):
            self._previous[number] = signal.signal(number, self._handle)
        self._previous[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._note_profile)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def take_profile(self) -> bool:
        """Whether a profile was asked for since the last call."""
        asked, self._profile = self._profile, False
        return asked

    def _note_profile(self, number: int, frame: object) -> None:
        self._profile = True

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.requested is not None:
            os.write(2, b"\nstopped at once; the last complete checkpoint stays\n")
            os._exit(Exit.INTERRUPTED)
        self.requested = Exit.INTERRUPTED if number == signal.SIGINT else Exit.PREEMPTED
        again = " (again to stop at once)" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving, then stopping{again}\n".encode())
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end the process with `Exit.PREEMPTED`, for jobs that keep what is finished as they go.

    A thread hears them, also while Python waits in a collective. To be entered after `distributed.start`, whose preemption
    service would take SIGTERM for itself.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while (number := os.read(reader, 1)[0]) != 0:
            if number in (signal.SIGTERM, signal.SIGUSR1):
                os.write(2, f"\n{signal.Signals(number).name}: stopped; give the same command again\n".encode())
                os._exit(Exit.PREEMPTED)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)
