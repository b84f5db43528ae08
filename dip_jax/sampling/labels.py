"""Which classes are drawn, and in which order."""

from collections.abc import Sequence

import numpy as np

from dip_jax.errors import UserError
from dip_jax.models import dip


def interleave(classes: Sequence[int], count: int) -> np.ndarray:
    """`count` labels, label i being class i mod K: a class-sorted file would spoil the Inception Score."""
    return np.resize(np.asarray(classes, np.int32), count)


def check_labels(labels: Sequence[int] | np.ndarray, model: dip.DiP) -> np.ndarray:
    """The labels as int32 [N].

    Raises:
        UserError: if there are none or one lies outside [0, num_classes].
    """
    array = np.asarray(labels)
    classes = model.config.num_classes
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"labels must be a list of at least one class number, such as [0, 1]; got {labels!r:.80}")
    wrong = array[(array < 0) | (array > classes)]
    if wrong.size:
        raise UserError(f"label {wrong[0]} is not a class: this model has 0..{classes - 1} (and {classes}, no class)")
    return array.astype(np.int32)
