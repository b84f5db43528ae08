"""In which leaves a stored tree of arrays differs from the one that is wanted."""

from typing import Any

import jax
import numpy as np


def describe(stored: Any, wanted: Any, *, partial: bool) -> str | None:
    """Up to five leaves of other name, shape or dtype, in one line; None where everything fits.

    Args:
        stored, wanted: nested containers of anything with a shape and a dtype.
        partial: leaves that only `stored` has are no mismatch.
    """
    old, new = _leaves(stored), _leaves(wanted)
    lines = [
        f"{name}: {old[name]} in the checkpoint, {new[name]} here" for name in new if name in old and old[name] != new[name]
    ]
    lines += [f"{name}: not in the checkpoint" for name in new if name not in old]
    lines += [f"{name}: only in the checkpoint" for name in old if name not in new and not partial]
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more if lines else None


def _leaves(tree: Any) -> dict[str, str]:
    """Dotted name -> "float32[3, 4]" of every array."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): f"{np.dtype(x.dtype)}{list(x.shape)}" for path, x in flat}
