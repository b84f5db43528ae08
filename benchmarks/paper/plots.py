"""The look of every picture: readable in grey, by marker and line style as much as by colour."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Colour, marker, line: the colours differ in lightness too.
STYLES = (
    ("#111111", "o", "-"),
    ("#d1495b", "s", "--"),
    ("#3b7dd8", "^", "-."),
    ("#8fb339", "D", ":"),
    ("#edae49", "v", (0, (5, 1, 1, 1))),
    ("#7a5195", "P", (0, (3, 1, 1, 1, 1, 1))),
    ("#66c2c2", "X", (0, (1, 1))),
    ("#b07040", "<", "-"),
    ("#999999", ">", "--"),
    ("#2e6f57", "*", "-."),
)


def figure(width: float, height: float) -> Figure:
    """An empty picture, inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made: Figure, path: pathlib.Path) -> None:
    """As PNG without a date, so that the same numbers give the same file; it carries the digest of its tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=110, metadata={"Software": None, "Source": digest(path)})


def digest(path: pathlib.Path) -> str:
    """SHA-256 of the tables from which the picture at `path` is drawn."""
    tables = sorted(path.parent.glob(f"{path.stem}*.csv"))
    return hashlib.sha256(b"".join(table.read_bytes() for table in tables)).hexdigest()


def tidy(axes: Axes, *, title: str, x: str = "", y: str = "") -> None:
    """Title at the left, labels, a faint grid, no box."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def dots(axes: Axes, groups: Sequence[str], values: Sequence[Sequence[float]], *, title: str, x: str) -> None:
    """A row per group: a dot per seed, a bar at the mean, the mean in figures."""
    for row, each in enumerate(values):
        axes.plot(each, [row] * len(each), "o", color="#3b7dd8", markersize=6, alpha=0.75, markeredgecolor="#111111")
        mean = float(np.mean(each))
        axes.plot([mean, mean], [row - 0.28, row + 0.28], color="#111111", linewidth=2)
        axes.annotate(f"{mean:.4g}", (mean, row - 0.3), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.7)
    axes.margins(x=0.15)
    tidy(axes, title=title, x=x)


def by(rows: Sequence[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    """Rows grouped by the values of some columns, in order of appearance."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
