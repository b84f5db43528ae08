"""What a set of samples depends on, as JSON values: written beside it, and what a resumed run must agree with."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dip_jax import config
from dip_jax.models import dip
from dip_jax.sampling import sampler
from dip_jax.sampling.trajectories import Weaker
from dip_jax.typing import Params


def describe(
    model: dip.DiP,
    params: Params,
    made: Mapping[str, Any],
    *,
    labels: np.ndarray,
    seed: int,
    options: config.Sample,
    guide: Weaker | None = None,
) -> dict[str, Any]:
    """The settings of samples.

    Args:
        model, params: what draws.
        made: how they are called: weights, step, precision.
        labels, seed, options, guide: as `trajectories.draw_batches` takes them.
    """
    conditional, other = sampler.nfe(options)
    guided = (
        {"guide": {"weights_sha256": digest(guide.params), "model": dataclasses.asdict(guide.model.config)}} if guide else {}
    )
    return {
        "samples": len(labels),
        "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
        "seed": seed,
        **dataclasses.asdict(options),
        "nfe": {"conditional": conditional, "guide" if guide else "unconditional": other},
        "weights_sha256": digest(params),
        "prediction": model.config.prediction,
        "t_clip": model.config.t_clip,
        **made,
        "model": dataclasses.asdict(model.config),
        **guided,
    }


def digest(params: Params) -> str:
    """SHA-256 of weights."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        total.update(np.ascontiguousarray(leaf))
    return total.hexdigest()
