"""What every worker process of ours does first, and what a script must not forget that starts some."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading

# Exit code of a process that was started only to find itself at the call that starts processes.
UNGUARDED = 97
GUARD = (
    "processes are started here, and each begins by running this script from the top: put what it does under "
    '`if __name__ == "__main__":`'
)


def end_if_unguarded() -> None:
    """Ends this process where it is a worker that runs the main script for its definitions and meets the call itself.

    Every function that starts processes calls this first: else such a worker would start workers in turn, or die with a
    traceback of `multiprocessing`. The parent sees `UNGUARDED` and says `GUARD`.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "__mp_main__" and frame.f_code.co_name == "<module>":
            os._exit(UNGUARDED)
        frame = frame.f_back


def die_with_parent() -> None:
    """Ends this worker at once when its parent dies, however it dies; else it would stay, with its memory and open terminal.

    The parent's end of the sentinel pipe closes with the process. (The kernel's parent-death signal would not do: it fires
    when the *thread* that started the worker ends.)
    """
    sentinel = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def ignore_signals() -> None:
    """Leaves Ctrl-C and a scheduler's warning to the parent, which saves and then ends this worker.

    Both reach every process of a terminal or of a job; a reader that died of one would fail the step before the save.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
