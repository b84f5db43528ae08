"""A small set of rows in which chosen pairs of factors have every allowed pair of values."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairs_of(row: Mapping[str, Any], together: Collection[tuple[str, str]]) -> set[tuple]:
    """The pairs of values of a row, of the factors that are named `together`."""
    return {(a, row[a], b, row[b]) for a, b in together}


def cover(
    factors: Mapping[str, Sequence[Any]], together: Collection[tuple[str, str]], allowed: Callable[[Row], bool]
) -> list[Row]:
    """Rows with one value for each factor in which all that an allowed row can pair is paired; always the same ones.

    Greedy: of all allowed rows the one with the most pairs that no row before it has, the first of them in order.
    """
    rows = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    waiting = [(row, pairs_of(row, together)) for row in rows if allowed(row)]
    missing = set().union(*(pairs for _, pairs in waiting))
    chosen: list[Row] = []
    while missing:
        row, pairs = max(waiting, key=lambda one: len(one[1] & missing))
        chosen.append(row)
        missing -= pairs
    return chosen
