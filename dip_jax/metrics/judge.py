"""A feature network and a reference, ready to put numbers on sets of samples."""

import functools
import hashlib
import io
import json
import os
import zipfile
from typing import Any

import jax
import numpy as np
from etils import epath

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.metrics import features as feature_networks
from dip_jax.metrics import inputs, statistics
from dip_jax.metrics.features import KEPT, Network, Summary, summarise
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile
from dip_jax.metrics.statistics import Gaussian
from dip_jax.runtime import sharding

_FORMAT = 1  # of the cached statistics


class Judge:
    """Judges samples against one reference, whose statistics are taken at the first call and kept where `cache` says.

    Args:
        network: from `features.open_network`.
        reference: images, or what a reference .npz holds.
        gallery: labelled images whose nearest one names the class of a sample; None leaves that number out.
        batch_size: images per call of the network.
        cache: folder for statistics of references that have a fingerprint; None keeps nothing.

    Raises:
        UserError: the reference holds too little for this network, or statistics of another one.
    """

    def __init__(
        self,
        network: Network,
        reference: ImageSet | ReferenceFile,
        *,
        gallery: ImageSet | None = None,
        batch_size: int = 50,
        cache: epath.PathLike | None = None,
    ):
        if isinstance(reference, ImageSet):
            reference = ReferenceFile(reference, None, None)
        self._network, self._batch_size = network, batch_size
        self._cache = None if cache is None else epath.Path(cache)
        self._images, self._gallery = reference.images, gallery
        self._given = _given(network, reference)
        if self._images is None and not self._given:
            raise UserError(
                f"the reference has statistics of Inception features but no images (arr_0), and features={network.name} needs "
                "images: name a prepared dataset or an .npz of images"
            )
        for images in (self._images, gallery):
            self._check(images)

    @functools.cached_property
    def _reference(self) -> Summary | None:
        return None if self._images is None else self._summary(self._images)

    @functools.cached_property
    def _neighbours(self) -> Summary | None:
        return None if self._gallery is None else self._summary(self._gallery)

    @property
    def _gaussians(self) -> dict[str, Gaussian]:
        return self._given or self._reference.gaussians

    def __call__(self, samples: ImageSet) -> dict[str, float | int]:
        """Every metric of the samples, by name; the names carry the network's suffix, and N their number.

        Takes this process's devices alone, also inside a run whose mesh spans several hosts.

        Raises:
            UserError: too few samples, or of another size than the reference's images.
        """
        with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])):
            return self._judge(samples)

    def _judge(self, samples: ImageSet) -> dict[str, float | int]:
        self._check(samples)
        if self._images is not None and samples.image_shape != self._images.image_shape:
            raise UserError(
                f"{samples.name} holds images of {_size(samples)}, the reference {self._images.name} of {_size(self._images)}: "
                "resized copies give other numbers; make both of one size"
            )
        drawn = summarise(self._network, samples, batch_size=self._batch_size, with_logits=True)
        names = {"pool": "fid", "spatial": "sfid"}
        values = {
            names[key]: statistics.frechet_distance(drawn.gaussians[key], other) for key, other in self._gaussians.items()
        }
        values["is"] = statistics.inception_score(drawn.logits)
        if self._reference is not None:
            both = statistics.precision_recall(drawn.vectors, self._reference.vectors)
            values |= {"precision": both.precision, "recall": both.recall}
        if self._neighbours is not None and samples.labels is not None:
            labels = self._gallery.labels[self._neighbours.kept]
            values["nearest"] = statistics.nearest_accuracy(drawn.vectors, samples.labels, self._neighbours.vectors, labels)
        return {"N": samples.count} | {name + self._network.suffix: value for name, value in values.items()}

    def notes(self, count: int) -> list[str]:
        """What a reader of the numbers of `count` samples must know, as sentences."""
        lines = []
        for side, n in (("samples", count), ("reference images", self._gaussians["pool"].count)):
            if n is not None and n <= self._network.dimensions["pool"]:
                lines.append(
                    f"{n} {side} for {self._network.dimensions['pool']} feature dimensions: the covariance is singular and the "
                    f"distance biased upwards; compare it only with rows of the same N."
                )
        if self._network.suffix:
            lines.append(
                f"Metrics in *{self._network.suffix} come from another network than published FIDs; they do not compare."
            )
        if self._reference is None:
            lines.append("The reference holds no images, so there is no precision and no recall.")
        return lines

    def _check(self, images: ImageSet | None) -> None:
        least = statistics.NEIGHBOURS + 1
        if images is not None and images.count < least:
            raise UserError(f"{images.name} holds {images.count} images; precision and recall need at least {least}")

    def protocol(self) -> dict[str, Any]:
        """How the numbers are taken, as JSON values."""
        images, reference = self._images, self._reference
        return {
            "features": self._network.name,
            "features_sha256": self._network.digest,
            "input": "" if images is None else self._network.input(*images.image_shape[:2]),
            "reference": "statistics" if images is None else images.name,
            "reference_fingerprint": None if images is None else images.fingerprint,
            "reference_images": self._gaussians["pool"].count,
            "reference_statistics": "from the file" if self._given else "computed",
            "precision_recall": None
            if reference is None
            else f"k={statistics.NEIGHBOURS}, {len(reference.vectors)} references",
            "inception_score": f"mean over contiguous splits of {statistics.SPLIT}",
            "nearest": None if self._gallery is None else f"1 of {len(self._neighbours.vectors)} of {self._gallery.name}",
            "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        }

    def _summary(self, images: ImageSet) -> Summary:
        """Of a reference: from the cache, else computed and kept there."""
        file = self._cache_file(images)
        if file is not None and file.exists():
            found = _read(file, self._network)
            if found is not None:
                return found
        summary = summarise(self._network, images, batch_size=self._batch_size, keep=KEPT)
        if file is not None:
            _write(file, summary)
        return summary

    def _cache_file(self, images: ImageSet) -> epath.Path | None:
        if self._cache is None or images.fingerprint is None:
            return None
        key = {
            "format": _FORMAT,
            "images": images.fingerprint,
            "network": self._network.digest,
            "input": self._network.input(*images.image_shape[:2]),
            "kept": KEPT,
            "precision": jax.config.jax_default_matmul_precision or "default",
            "platform": jax.default_backend(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._cache / f"statistics_{self._network.name}_{digest[:24]}.npz"


def _given(network: Network, reference: ReferenceFile) -> dict[str, Gaussian]:
    """The file's own statistics, where the network is the one that they were taken with."""
    found = {name: g for name, g in (("pool", reference.pool), ("spatial", reference.spatial)) if g is not None}
    if not found or network.suffix:
        return {}
    for name, gaussian in found.items():
        if len(gaussian.mean) != network.dimensions[name]:
            raise UserError(
                f"the reference's {name} statistics have {len(gaussian.mean)} dimensions, expected {network.dimensions[name]}: "
                "they were taken with another network; use one of the ADM reference files"
            )
    return found


def _size(images: ImageSet) -> str:
    return f"{images.image_shape[0]}x{images.image_shape[1]}"


def _write(file: epath.Path, summary: Summary) -> None:
    arrays = {"count": np.array(summary.count), "vectors": summary.vectors, "kept": summary.kept}
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
            return Summary(count, gaussians, f["vectors"], f["kept"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def open_judge(
    wanted: config.Eval, *, image_size: int, gallery: ImageSet | None = None, cache: epath.PathLike | None = None
) -> Judge:
    """The judge that a config section asks for; opened before anything is compiled, so that a missing file is told at once.

    Raises:
        UserError: the reference or the weights are missing, or do not fit together.
    """
    network = feature_networks.open_network(wanted.features, wanted.weights)
    against = inputs.reference_set(wanted.reference, image_size=image_size)
    return Judge(network, against, gallery=gallery, batch_size=wanted.batch_size, cache=cache)


def default_cache() -> str:
    """The folder in which statistics of references are kept."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dip_jax")
