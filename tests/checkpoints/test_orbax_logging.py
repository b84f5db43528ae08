"""Of the errors that nobody can catch one kind is dropped: what TensorStore reports to an event loop that Orbax has closed."""

import asyncio
import sys
import types

import pytest

from dip_jax.checkpoints import orbax_logging


def unraisable(error: BaseException, *, by: object = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(exc_type=type(error), exc_value=error, exc_traceback=None, err_msg=None, object=by)


@pytest.fixture
def passed_on(monkeypatch) -> list:
    """What the hook that was there before is given."""
    seen: list = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    orbax_logging.quieten_orbax()
    orbax_logging.quieten_orbax()  # every checkpoint that is opened calls it
    return seen


def test_only_a_late_report_from_no_python_object_is_dropped(passed_on):
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as late:
        loop.call_soon_threadsafe(print)
    sys.unraisablehook(unraisable(late.value))
    assert passed_on == []
    others = [unraisable(late.value, by=print), unraisable(RuntimeError("something else")), unraisable(KeyError("lost"))]
    for other in others:
        sys.unraisablehook(other)
    assert passed_on == others
