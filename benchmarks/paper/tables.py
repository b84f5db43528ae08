"""CSV files: what the pictures are drawn from, and nothing else."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dip_jax.errors import UserError


def write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows whole: they share their columns, floats are shortened to 6 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    partial.replace(path)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows; what looks like a number is one.

    Raises:
        UserError: if there is no such file.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run the experiment without --plot-only first")
    with open(path, newline="") as file:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
