"""What a reader of the numbers must know about a set of samples: how its classes lie, and whether its colours are swapped."""

import numpy as np

from dip_jax.metrics.image_sets import ImageSet
from dip_jax.metrics.statistics import SPLIT

_LOST = 1.1  # a factor in the Inception Score
_SURE = 4  # standard errors


def class_notes(samples: ImageSet) -> list[str]:
    """Sentences on unequal numbers of images per class and on an order by class; none without labels or where all is well."""
    if samples.labels is None:
        return []
    lines = []
    _, ranks, counts = np.unique(samples.labels, return_inverse=True, return_counts=True)
    if counts.max() - counts.min() > 1:
        lines.append(
            f"{samples.name}: {counts.min()} to {counts.max()} images per class; numbers of one protocol have equally many, "
            "so compare only with sets of the same shares."
        )
    factor, chance, seen = _lost_to_the_order(ranks, len(counts))
    if factor > _LOST * chance**2:
        lines.append(
            f"{samples.name}: the images lie in order of their classes: a split of {SPLIT} images holds {seen:.0f} of "
            f"{len(counts)} classes on average. The Inception Score is a mean over such splits and too low, by up to a factor "
            f"of {factor:.1f}: interleave or shuffle images and labels together. No other number depends on the order."
        )
    return lines


def _lost_to_the_order(ranks: np.ndarray, classes: int) -> tuple[float, float, float]:
    """(factor by which the score of a model whose classes are all recognised falls; what chance explains of it; classes seen).

    Such a model's score within a split is the exponential of the entropy of the split's classes. Classes drawn at random have
    an entropy that is (classes - 1) (splits - 1) / 2N lower in splits than in the whole.
    """
    starts = range(0, len(ranks), SPLIT)
    tables = np.stack([np.bincount(ranks[start : start + SPLIT], minlength=classes) for start in starts])
    within = np.mean([np.exp(_entropy(table)) for table in tables])
    chance = np.exp((classes - 1) * (len(tables) - 1) / (2 * len(ranks)))
    return float(np.exp(_entropy(tables.sum(axis=0))) / within), float(chance), float((tables > 0).sum(axis=1).mean())


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def colour_notes(samples: ImageSet, warmth: np.ndarray, reference: np.ndarray) -> list[str]:
    """A sentence where red and blue look swapped: their difference is the reference's with the other sign.

    Args:
        samples: named in it.
        warmth, reference: mean red minus mean blue of every image of the two sets, [N] and [M].
    """
    ours, theirs = warmth.mean(), reference.mean()
    error = np.sqrt(warmth.var() / len(warmth) + reference.var() / len(reference))
    if abs(ours - theirs) <= _SURE * error or abs(ours - theirs) <= 3 * abs(ours + theirs):
        return []
    return [
        f"{samples.name}: red and blue look swapped (red minus blue is {ours:.1f} on average, {theirs:.1f} in the reference), "
        "as OpenCV's BGR has them: save images[..., ::-1]."
    ]
