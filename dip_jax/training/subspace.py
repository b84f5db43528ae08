"""The subspace of rank-asymmetric prediction (`models/asym.py`): found by one pass over the dataset before the first step."""

import hashlib
import io
import time

import numpy as np
from etils import epath

from dip_jax import config
from dip_jax.data import prepared
from dip_jax.models import asym, starting
from dip_jax.runtime import distributed, storage
from dip_jax.typing import Params

IMAGES = 10_000  # at most so many, spread evenly over the dataset, as the authors take


def prepare(
    params: Params, origin: starting.Origin | None, model: config.Model, dataset: prepared.Dataset, workdir: epath.Path
) -> Params:
    """The first weights with their subspace: that of the model they come from where it has one of this size, else a new one.

    The main process finds it and leaves it in the workdir, and all read it there. All must call it.

    Args:
        params: from `init`, perhaps with weights from elsewhere.
        origin: whose weights the run starts from; None where it starts from its seed.
        model: of `params`.
    """
    if asym.SUBSPACE not in params:
        return params
    had = None if origin is None else origin.params.get(asym.SUBSPACE)
    if had is not None and had.shape == params[asym.SUBSPACE].shape:
        return {**params, asym.SUBSPACE: np.asarray(had)}
    path = workdir / f"subspace_{model.patch_size}_{model.subspace_rank}_{dataset.fingerprint[:16]}.npy"
    distributed.on_main(lambda: None if path.exists() else _find(path, model=model, dataset=dataset))
    found = distributed.on_all(lambda: np.load(io.BytesIO(path.read_bytes())))
    return {**params, asym.SUBSPACE: found}


def fingerprint(params: Params) -> str | None:
    """SHA-256 of the subspace: what a checkpoint remembers beside the array; None where there is none."""
    if asym.SUBSPACE not in params:
        return None
    return hashlib.sha256(np.ascontiguousarray(np.asarray(params[asym.SUBSPACE]))).hexdigest()


def _find(path: epath.Path, *, model: config.Model, dataset: prepared.Dataset) -> None:
    started, count = time.monotonic(), min(len(dataset), IMAGES)
    distributed.say(f"finding the subspace of rank {model.subspace_rank} in {count:,} images")
    images = (dataset.replaced(int(i))[0]["image"] for i in np.linspace(0, len(dataset) - 1, count))
    basis = asym.find_subspace(images, patch_size=model.patch_size, rank=model.subspace_rank)
    buffer = io.BytesIO()
    np.save(buffer, basis)
    storage.write_bytes(path, buffer.getvalue())
    distributed.say(f"found in {time.monotonic() - started:.1f} s: {path}")
