"""What a value of a section must be; every complaint names the key."""

import difflib
import math
from typing import Any

from dip_jax.errors import UserError


def one_of(key: str, value: str, valid: Any) -> None:
    """Raises `UserError` where `value` is none of `valid`, with the nearest that is."""
    if value not in valid:
        nearest = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)[0]
        raise UserError(f"{key}={value!r} is unknown: it is one of {', '.join(valid)}; did you mean {nearest!r}?")


def positive(section: str, values: Any, *names: str) -> None:
    """Raises `UserError` where a field of these names is not a finite number above 0."""
    for name in names:
        if not 0 < getattr(values, name) < math.inf:
            raise UserError(f"{section}.{name}={getattr(values, name)} must be positive")


def not_negative(section: str, values: Any, *names: str) -> None:
    """Raises `UserError` where a field of these names is not a finite number from 0."""
    for name in names:
        if not 0 <= getattr(values, name) < math.inf:
            raise UserError(f"{section}.{name}={getattr(values, name)} must not be negative")
