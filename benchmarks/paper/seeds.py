"""What a few seeds can tell apart: a paired t-test in words."""

import math
import statistics
from collections.abc import Mapping, Sequence

LEVEL = 4.303  # of |t| with 2 degrees of freedom: 5 % of differences between three equal pairs are larger


def judge(differences: Sequence[float]) -> str:
    """better, worse, or that nothing can be told apart, by paired differences (lower is better)."""
    if len(differences) < 3:
        return "too few seeds"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    if abs(mean) <= LEVEL * error:
        return "cannot be told apart"
    return "better" if mean < 0 else "worse"


def neighbours(values: Mapping[str, Mapping[int, float]]) -> list[dict]:
    """The variants from the lowest mean to the highest, and whether each can be told from the one after it.

    Args:
        values: by variant, by seed.
    """
    ranked = sorted(values, key=lambda name: statistics.fmean(values[name].values()))
    found = []
    for rank, name in enumerate(ranked):
        seeds = values[name]
        row = {"rank": rank + 1, "variant": name, "mean": statistics.fmean(seeds.values()), "low": min(seeds.values())}
        row |= {"high": max(seeds.values()), "beside the next": ""}
        if rank + 1 < len(ranked):
            after = values[ranked[rank + 1]]
            row["beside the next"] = judge([seeds[seed] - after[seed] for seed in seeds if seed in after])
        found.append(row)
    return found
