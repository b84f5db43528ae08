"""Points of a sweep over sampling options: which there are, when one is cut short, how their rows read, which is the best.

All points have the same noise: sample i starts from what (seed, i) says. They are taken in the order of the grid. Of each the
first quarter, rounded up to whole batches, is judged before the rest is drawn, and

    a point is cut short where  FID(its first quarter) > cut * min over the points before it of FID(their first quarters),

so whether it is depends on the grid alone, not on when a sweep was stopped and started again. Quarters have the same number of
images, hence the same bias.
"""

import csv
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.sampling import sampler

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One set of options, and the average of the weights that it is drawn from.

    Attributes:
        weights: the item of the step, as `checkpoint.load` names it.
        shown: what a row calls it.
        options: solver, steps, guidance, interval, shift.
    """

    weights: str
    shown: str
    options: config.Sample

    @property
    def name(self) -> str:
        """Of its files."""
        o = self.options
        words = (self.weights, o.solver, o.steps, f"shift{o.t_shift:g}", f"w{o.guidance:g}", *(f"{t:g}" for t in o.interval))
        return "_".join(map(str, words))


def grid(
    weights: Sequence[tuple[str, str]],
    base: config.Sample,
    *,
    solver: Sequence[str],
    steps: Sequence[int],
    t_shift: Sequence[float],
    interval: Sequence[tuple[float, float]],
    guidance: Sequence[float],
) -> list[Point]:
    """All points, guidance running fastest and the average slowest.

    Args:
        weights: (item, what a row calls it) of each average.
        base: the options that are not varied.
        solver, steps, t_shift, interval, guidance: the values of each.

    Raises:
        UserError: for a value out of range, or one that is given twice.
    """
    axes = {"solver": solver, "steps": steps, "t_shift": t_shift, "interval": interval, "guidance": guidance}
    for name, values in axes.items():
        if len(set(values)) != len(values) or not values:
            raise UserError(f"--{name}: {', '.join(map(str, values)) or 'no value'}: name each value once")
    chosen = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    options = [dataclasses.replace(base, **values) for values in chosen]
    return [Point(item, shown, each) for item, shown in weights for each in options]


def first_part(count: int, batch_size: int) -> int:
    """Images of the first quarter of `count` in whole batches; `count` itself where that is no less."""
    return min(math.ceil(count / 4 / batch_size) * batch_size, count)


def is_cut(fid: float, before: Iterable[float], *, cut: float) -> bool:
    """The rule above; `before` are the first quarters' FIDs of the points before. `cut` 0 cuts nothing."""
    lowest = min(before, default=math.inf)
    return bool(cut) and fid > cut * lowest


def fid_name(metrics: Mapping[str, Any]) -> str:
    """What the FID is called, by the network that took it."""
    return next(name for name in metrics if name == "fid" or name.startswith("fid_"))


def row(point: Point, labels: np.ndarray, metrics: Mapping[str, Any], *, seed: int, step: str, cut: bool) -> Row:
    """A row: everything that its numbers depend on, then the numbers.

    Args:
        point: whose.
        labels: of the images that were judged.
        metrics: from a judge, "N" among them.
        seed, step: of the noise and of the checkpoint.
        cut: whether it was cut short.
    """
    o, (conditional, unconditional) = point.options, sampler.nfe(point.options)
    _, counts = np.unique(labels, return_counts=True)
    fewest, most = int(counts.min()), int(counts.max())
    numbers = dict(metrics)
    return {
        "weights": point.shown,
        "step": step,
        "solver": o.solver,
        "steps": o.steps,
        "t_shift": o.t_shift,
        "guidance": o.guidance,
        "low": o.interval[0],
        "high": o.interval[1],
        "evaluations": f"{conditional}+{unconditional}",
        "seed": seed,
        "per_class": str(most) if fewest == most else f"{fewest} to {most}",
        "cut": "after the first quarter" if cut else "",
        **numbers,
    }


def best(rows: Mapping[str, Row]) -> str:
    """The name of the point with the lowest FID among those that were not cut short; of equals the first."""
    whole = {name: each for name, each in rows.items() if not each["cut"]}
    return min(whole, key=lambda name: whole[name][fid_name(whole[name])])


@dataclass(frozen=True)
class Spread:
    """A number over several seeds."""

    mean: float
    deviation: float  # of a single one: the sample standard deviation; NaN for a single seed
    low: float
    high: float

    def __str__(self) -> str:
        around = "" if math.isnan(self.deviation) else f" ± {self.deviation:.3g}"
        return f"{self.mean:.4g}{around} ({self.low:.4g} to {self.high:.4g})"


def spreads(rows: Sequence[Row]) -> dict[str, Spread]:
    """Of every metric that all rows have."""
    found = {}
    for name in itertools.takewhile(lambda key: key != "cut", reversed(rows[0])):
        values = [each[name] for each in rows]
        if name != "N" and all(isinstance(value, float) for value in values):
            deviation = statistics.stdev(values) if len(values) > 1 else math.nan
            found[name] = Spread(statistics.fmean(values), deviation, min(values), max(values))
    return dict(reversed(found.items()))


def csv_text(rows: Sequence[Row]) -> str:
    """The rows with a head; numbers with all their digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for each in rows for key in each)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
