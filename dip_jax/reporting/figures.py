"""Pictures for people: a grid with a row per class, the way from noise to image, and curves."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from dip_jax.reporting import lettering
from dip_jax.sampling.trajectories import Frames

_PAPER, _INK, _FAINT = (255, 255, 255), (28, 30, 33), (120, 124, 130)
_CELL = 96  # images are enlarged by whole factors until they are about this wide
_GAP, _MARGIN, _TEXT = 4, 16, 15  # pixels


@dataclass(frozen=True)
class Labelled:
    """Images and their classes: uint8 [N,H,W,3] and int [N]."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, "N"]

    def of(self, label: int, count: int) -> UInt8[np.ndarray, "n H W 3"]:
        """The first `count` images of a class."""
        return self.images[np.flatnonzero(self.labels == label)[:count]]


def class_grid(pictures: Labelled, names: Sequence[str], *, heads: Sequence[str] = ()) -> Image.Image:
    """One row per class, in order of first appearance, its name at the left.

    Args:
        pictures: what to show.
        names: of all classes; beyond them lies the null class.
        heads: of the columns, where these mean something.
    """
    shown = list(dict.fromkeys(pictures.labels.tolist()))
    rows = [list(pictures.of(label, len(pictures.labels))) for label in shown]
    return _table(rows, captions=[lettering.caption(names, label) for label in shown], heads=heads)


def trajectory(frames: Frames, names: Sequence[str]) -> Image.Image:
    """Two rows per sample, time running right: x_t, and the image that the network expects; both end at the sample."""
    rows, captions = [], []
    for b, label in enumerate(frames.labels.tolist()):
        rows += [[*frames.noisy[:, b], frames.images[b]], [*frames.expected[:, b], frames.images[b]]]
        captions += [f"{lettering.caption(names, label)}\nnoisy image", "expected image"]
    return _table(rows, captions=captions, heads=[*(f"t = {t:.2f}" for t in frames.times.tolist()), "t = 1"])


def encode(image: UInt8[np.ndarray, "H W 3"] | Image.Image) -> tuple[str, bytes]:
    """(media type, bytes): PNG, or JPEG at high quality for images too large to embed by the dozen."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if max(image.size) <= 128:
        image.save(buffer, format="png", optimize=True)
        return "image/png", buffer.getvalue()
    image.save(buffer, format="jpeg", quality=93, subsampling=0)
    return "image/jpeg", buffer.getvalue()


def curve(history: Sequence[Mapping[str, Any]], key: str, *, title: str) -> str | None:
    """An inline SVG of history[key] over history["step"] in the colours of the page around it; None for fewer than 2 points.

    The faint line is what was measured, the strong one its running mean.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = [(row["step"], row[key]) for row in history if _is_number(row.get(key)) and "step" in row]
    if len(points) < 2:
        return None
    step, value = np.array(sorted(points), np.float64).T
    ink = "#010203"  # stands for the page's own text colour
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", color=ink, fontsize=10, fontweight="bold")
        axes.plot(step, value, color="#4c8bf5", alpha=0.35, linewidth=1)
        axes.plot(step, _smooth(value), color="#4c8bf5", linewidth=1.8)
        low, high = _range(value)
        axes.set_ylim(low, high)
        axes.grid(axis="y", color=ink, alpha=0.12, linewidth=0.8)
        axes.tick_params(colors=ink, length=0)
        axes.set_xlabel("step", color=ink)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(ink)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(ink, "currentColor")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _range(value: np.ndarray) -> tuple[float, float]:
    """Limits that a few wild values at the start do not stretch."""
    low, high = np.quantile(value, [0.0, 0.98])
    pad = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    return low - pad, high + pad


def _smooth(value: np.ndarray) -> np.ndarray:
    """Mean over a window of about 1/20 of the curve, narrower at the ends."""
    half = max(len(value) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(value)])
    index = np.arange(len(value))
    reach = np.minimum(np.minimum(index, len(value) - 1 - index), half)
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _table(rows: list[list[np.ndarray]], *, captions: Sequence[str], heads: Sequence[str] = ()) -> Image.Image:
    """Rows of equal-sized images with a caption at the left of each and, where given, a head above each column."""
    font = lettering.font(_TEXT)
    height, width = rows[0][0].shape[:2]
    scale = max(round(_CELL / width), 1)
    height, width = height * scale, width * scale
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = _MARGIN + max(int(pen.multiline_textbbox((0, 0), text, font=font)[2]) for text in captions) + _MARGIN
    top = _MARGIN + (_TEXT + 8 if heads else 0)
    columns = max(len(row) for row in rows)
    size = (left + columns * (width + _GAP) - _GAP + _MARGIN, top + len(rows) * (height + _GAP) - _GAP + _MARGIN)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    for j, text in enumerate(heads):
        pen.text((left + j * (width + _GAP) + width / 2, _MARGIN), text, fill=_FAINT, font=font, anchor="ma")
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + i * (height + _GAP)
        pen.multiline_text((left - _MARGIN, y + height / 2), caption, fill=_INK, font=font, anchor="rm", align="right")
        for j, image in enumerate(row):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + j * (width + _GAP), y))
    return canvas
