"""Ends a run that hangs."""

import faulthandler
import sys


class Watchdog:
    """Ends the process when no step has finished for `seconds`: prints the stack of every thread and exits with code 1.

    The timer lives in a C thread that needs no Python to run, so a process stuck inside a collective ends too, and its peers
    with it. 0 is off.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def beat(self, *, patience: float = 1.0) -> None:
        """Starts the wait anew; `patience` lengthens it for what is known to be slow (compiling, saving, sampling)."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds * patience, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """No more waiting."""
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()
