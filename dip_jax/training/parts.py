"""Which parts of the parameters a run trains (`train.only`): the rest stays as it is to the bit, in weights and average."""

from collections.abc import Mapping
from typing import Any

import jax

from dip_jax.models import asym

ONLY = {"internal": ("internal",)}  # by `train.only`; a name that is not here trains everything


def is_trained(name: str, only: str) -> bool:
    """Whether the part of this name (a key of the parameter tree) is; the subspace of `models/asym.py` never."""
    return name != asym.SUBSPACE and name in ONLY.get(only, (name,))


def hold(params: Mapping[str, Any], only: str) -> dict[str, Any]:
    """The same values, of which those that are not trained pass no gradient: nothing is computed for them."""
    return {name: part if is_trained(name, only) else jax.lax.stop_gradient(part) for name, part in params.items()}


def keep(old: Mapping[str, Any], new: Mapping[str, Any], only: str) -> dict[str, Any]:
    """`new` where it is trained, else `old`: weight decay and rounding would move what has no gradient."""
    return {name: new[name] if is_trained(name, only) else old[name] for name in old}
