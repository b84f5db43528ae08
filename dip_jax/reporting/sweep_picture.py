"""The picture of a sweep: a heat map of the FID over guidance and everything else, and the curve of FID against IS."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_OTHERS = ("weights", "solver", "steps", "t_shift", "low", "high")


def draw(rows: Sequence[Mapping[str, Any]], *, fid: str, inception: str) -> bytes:
    """A PNG. In the map the best cell is framed, and cells cut short (of fewer images) are hatched; the curves leave them out.

    Args:
        rows: of a sweep, in the order of its grid.
        fid, inception: the columns of the FID and of the Inception Score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(rows)
    scales = list(dict.fromkeys(row["guidance"] for row in rows))
    figure = Figure(figsize=(5.5 + 0.9 * len(scales) + 4.5, 2.2 + max(0.45 * len(lines), 2.6)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _heat_map(left, lines, scales, fid=fid)
    for label, cells in lines.items():
        whole = sorted((row for row in cells if not row["cut"]), key=lambda row: row["guidance"])
        right.plot([row[inception] for row in whole], [row[fid] for row in whole], marker="o", markersize=4, label=label)
        for row in whole:
            right.annotate(
                f"{row['guidance']:g}", (row[inception], row[fid]), xytext=(4, 4), textcoords="offset points", size=7
            )
    right.set_xlabel(inception)
    right.set_ylabel(fid)
    right.set_title("by guidance", loc="left", size=10)
    right.grid(alpha=0.2)
    right.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by everything but guidance, of which only what differs is named."""
    varied = [key for key in _OTHERS if len({row[key] for row in rows}) > 1]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        words = [str(row["weights"])] * ("weights" in varied)
        words += [f"{row[key]} {key}" if key == "steps" else f"{key} {row[key]}" for key in varied if key in _OTHERS[1:4]]
        words += [f"{row['low']:g} < t < {row['high']:g}"] * bool({"low", "high"} & set(varied))
        lines.setdefault(", ".join(words) or str(row["weights"]), []).append(row)
    return lines


def _heat_map(axes: Any, lines: Mapping[str, Sequence[Mapping[str, Any]]], scales: Sequence[float], *, fid: str) -> None:
    from matplotlib.patches import Rectangle

    values = np.full((len(lines), len(scales)), np.nan)
    whole = {}
    for i, cells in enumerate(lines.values()):
        for row in cells:
            j = scales.index(row["guidance"])
            values[i, j] = row[fid]
            if row["cut"]:
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor="white", linewidth=0))
            else:
                whole[i, j] = row[fid]
    axes.imshow(values, cmap="viridis_r", aspect="auto")
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
    for (i, j), value in np.ndenumerate(values):
        colour = "black" if value < middle else "white"
        axes.text(j, i, f"{value:.4g}", ha="center", va="center", size=8, color=colour)
    if whole:
        i, j = min(whole, key=whole.__getitem__)
        axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor="red", linewidth=2))
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(lines)), list(lines), size=8)
    axes.set_xlabel("guidance")
    axes.set_title(fid, loc="left", size=10)
