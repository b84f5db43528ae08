"""What Orbax and TensorStore print of failures that the program reports itself, in one line, is dropped."""

import dataclasses
import logging
import sys
from collections.abc import Callable


def quieten_orbax() -> None:
    """Keeps tracebacks of saves and restores in the background off stderr: each of those failures is raised again."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


@dataclasses.dataclass(frozen=True)
class _UnraisableHook:
    """Passes on what nobody can catch, but for one thing.

    Orbax closes its event loop at the first array that fails; TensorStore's C++ threads then report each of the others to it.
    """

    inner: Callable[["sys.UnraisableHookArgs"], None]

    def __call__(self, args: "sys.UnraisableHookArgs") -> None:
        late = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"
        if not (late and args.object is None):  # Python's own objects name themselves
            self.inner(args)
