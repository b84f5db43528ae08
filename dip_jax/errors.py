"""The one exception that means "the user can fix this", the exit codes a scheduler reads, and other errors in one line."""

import enum


class UserError(Exception):
    """A mistake of the user's: what was wrong, what was expected, what to do, in one line.

    `__main__` prints the message on stderr and exits with `Exit.USER_ERROR`, without a traceback.
    """


class Exit(enum.IntEnum):
    """Exit codes of every command; launch scripts and schedulers decide by them."""

    DONE = 0
    CRASH = 1  # also the watchdog: requeue a bounded number of times
    USER_ERROR = 2  # requeueing cannot help
    REJECTED_INPUTS = 3  # `prepare` met more bad images than --max_rejected
    PREEMPTED = 85  # saved; requeue
    NUMERIC_ABORT = 86  # non-finite numbers persisted
    INTERRUPTED = 130  # Ctrl-C after saving


class Interrupted(Exception):
    """A job stopped early but kept its work; carries the exit code that says how.

    Args:
        message: one line for the user, usually the command that goes on.
        code: anything but `Exit.DONE`: preempted, interrupted, numbers gone bad, inputs rejected.
    """

    def __init__(self, message: str, *, code: Exit):
        super().__init__(message)
        self.code = code


def cause(error: BaseException) -> BaseException:
    """The innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """The innermost cause of an error in one line."""
    error = cause(error)
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
