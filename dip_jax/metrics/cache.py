"""Summaries of references, kept in a folder: the second evaluation against one costs the samples only."""

import hashlib
import io
import json
import zipfile

import jax
import numpy as np
from etils import epath

from dip_jax.metrics import features
from dip_jax.metrics.features import KEPT, Network, Summary
from dip_jax.metrics.image_sets import ImageSet
from dip_jax.metrics.statistics import Gaussian
from dip_jax.runtime import storage

_FORMAT = 2


def default_folder() -> str:
    """The folder in which statistics of references are kept."""
    return storage.cache_folder()


def summarise(network: Network, images: ImageSet, *, batch_size: int, folder: epath.PathLike | None) -> Summary:
    """Of a reference, with `KEPT` vectors: from the folder, else computed and kept there; None keeps nothing."""
    file = None if folder is None or images.fingerprint is None else epath.Path(folder) / _name(network, images)
    if file is not None and file.exists():
        found = _read(file, network)
        if found is not None:
            return found
    summary = features.summarise(network, images, batch_size=batch_size, keep=KEPT)
    if file is not None:
        _write(file, summary)
    return summary


def _name(network: Network, images: ImageSet) -> str:
    key = {
        "format": _FORMAT,
        "images": images.fingerprint,
        "network": network.digest,
        "input": network.input(*images.image_shape[:2]),
        "kept": KEPT,
        "precision": jax.config.jax_default_matmul_precision or "default",
        "platform": jax.default_backend(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"statistics_{network.name}_{digest[:24]}.npz"


def _write(file: epath.Path, summary: Summary) -> None:
    arrays = {"count": np.array(summary.count), "vectors": summary.vectors, "kept": summary.kept, "warmth": summary.warmth}
    for name, gaussian in summary.gaussians.items():
        arrays |= {f"mean_{name}": gaussian.mean, f"covariance_{name}": gaussian.covariance}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.parent / f"{file.name}.partial"
        partial.write_bytes(buffer.getvalue())
        partial.replace(file)
    except OSError:
        return  # a cache that cannot be written costs time, not the result


def _read(file: epath.Path, network: Network) -> Summary | None:
    """What `_write` wrote; None where the file is damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as f:
            count = int(f["count"])
            gaussians = {name: Gaussian(f[f"mean_{name}"], f[f"covariance_{name}"], count) for name in network.dimensions}
            return Summary(count, gaussians, f["vectors"], f["kept"], f["warmth"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
