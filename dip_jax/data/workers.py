"""What every worker process of ours does first."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
