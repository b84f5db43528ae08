"""A feature network and a reference, ready to put numbers on sets of samples."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.metrics import borders, inputs, notes, statistics
from dip_jax.metrics import cache as kept
from dip_jax.metrics import features as feature_networks
from dip_jax.metrics.borders import BorderSteps
from dip_jax.metrics.features import Network, Summary
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile
from dip_jax.metrics.statistics import Gaussian
from dip_jax.runtime import sharding


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a set of samples.

    Attributes:
        metrics: every metric by name; the names carry the network's suffix, and N is the number of samples, None where a file
            of statistics does not say it.
        notes: what a reader of these numbers must know, as sentences.
    """

    metrics: dict[str, float | int | None]
    notes: list[str]


class Judge:
    """Judges samples against one reference, whose statistics are taken at the first call and kept where `cache` says.

    Args:
        network: from `features.open_network`.
        reference: images, or what a reference .npz holds.
        gallery: labelled images whose nearest one names the class of a sample; None leaves that number out.
        batch_size: images per call of the network.
        patch_size: side of the patches that the samples were drawn by, for the step across their borders ("border"); None
            leaves that number out.
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
        patch_size: int | None = None,
        cache: epath.PathLike | None = None,
    ):
        if isinstance(reference, ImageSet):
            reference = ReferenceFile(reference.name, reference)
        self._network, self._batch_size, self._cache = network, batch_size, cache
        self._patch_size = patch_size
        self._images, self._gallery = reference.images, gallery
        self._given = _given(network, reference)
        if self._images is None and not self._given:
            raise UserError(
                f"the reference has statistics of Inception features but no images (arr_0), and features={network.name} needs "
                "images: name a prepared dataset or an .npz of images"
            )
        for images in (self._images, gallery):
            if images is not None:
                _require_enough(images)

    def require_fit(self, samples: ImageSet | ReferenceFile) -> None:
        """Checks, before anything is computed, that samples can be judged.

        Raises:
            UserError: they are too few, or of another size than the reference's images, or statistics of another network.
        """
        if isinstance(samples, ImageSet):
            _require_enough(samples)
            self.require_size(samples.name, samples.image_shape)
            self._steps(samples)
        elif not _given(self._network, samples):
            raise UserError(
                f"{samples.name} holds statistics of Inception features but no images (arr_0), and features="
                f"{self._network.name} needs images"
            )

    def require_size(self, name: str, image_shape: tuple[int, int, int]) -> None:
        """Checks that samples of this shape can be judged.

        Raises:
            UserError: the reference's images are of another size.
        """
        if self._images is not None and image_shape != self._images.image_shape:
            sizes = ["{}x{}".format(*shape) for shape in (image_shape, self._images.image_shape)]
            raise UserError(
                f"{name} holds images of {sizes[0]}, the reference {self._images.name} of {sizes[1]}: resized copies give "
                "other numbers; make both of one size"
            )

    def _steps(self, samples: ImageSet) -> BorderSteps | None:
        return None if self._patch_size is None else BorderSteps(self._patch_size, samples.image_shape)

    def _summary(self, images: ImageSet) -> Summary:
        return kept.summarise(self._network, images, batch_size=self._batch_size, folder=self._cache)

    @functools.cached_property
    def _reference(self) -> Summary | None:
        return None if self._images is None else self._summary(self._images)

    @functools.cached_property
    def _neighbours(self) -> Summary | None:
        return None if self._gallery is None else self._summary(self._gallery)

    @property
    def _gaussians(self) -> dict[str, Gaussian]:
        return self._given or self._reference.gaussians

    def __call__(self, samples: ImageSet | ReferenceFile) -> Verdict:
        """Every metric of the samples; of statistics the distances.

        Takes this process's devices alone, also inside a run whose mesh spans several hosts.

        Raises:
            UserError: as `require_fit`.
        """
        self.require_fit(samples)
        with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.local_devices()[:1])):
            if isinstance(samples, ReferenceFile):
                distances = self._distances(_given(self._network, samples))
                return Verdict({"N": None} | distances, [f"{samples.name} holds no images, so distances are all that it has."])
            return self._judge(samples)

    def _distances(self, gaussians: Mapping[str, Gaussian]) -> dict[str, float]:
        names = {"pool": "fid", "spatial": "sfid"}
        return {names[key]: statistics.frechet_distance(gaussians[key], other) for key, other in self._gaussians.items()}

    def _judge(self, samples: ImageSet) -> Verdict:
        steps = self._steps(samples)
        watched = samples if steps is None else borders.watching(samples, steps)
        drawn = feature_networks.summarise(self._network, watched, batch_size=self._batch_size, with_logits=True)
        values = self._distances(drawn.gaussians) | {"is": statistics.inception_score(drawn.logits)}
        if self._reference is not None:
            both = statistics.precision_recall(drawn.vectors, self._reference.vectors)
            values |= {"precision": both.precision, "recall": both.recall}
        if self._neighbours is not None and samples.labels is not None:
            labels = self._gallery.labels[self._neighbours.kept]
            values["nearest"] = statistics.nearest_accuracy(drawn.vectors, samples.labels, self._neighbours.vectors, labels)
        metrics = {"N": samples.count} | {name + self._network.suffix: value for name, value in values.items()}
        if steps is not None:
            metrics["border"] = steps.ratio()  # of pixels, whatever the network
        return Verdict(metrics, self._notes(samples, drawn))

    def _notes(self, samples: ImageSet, drawn: Summary) -> list[str]:
        count, lines = samples.count, [*samples.notes, *notes.class_notes(samples)]
        if self._reference is not None:
            lines += [*notes.colour_notes(samples, drawn.warmth, self._reference.warmth), *self._images.notes]
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
            "border": None
            if self._patch_size is None
            else f"step across borders of {self._patch_size}x{self._patch_size} over inside",
            "nearest": None if self._gallery is None else f"1 of {len(self._neighbours.vectors)} of {self._gallery.name}",
            "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        }


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


def _require_enough(images: ImageSet) -> None:
    least = statistics.NEIGHBOURS + 1
    if images.count < least:
        raise UserError(f"{images.name} holds {images.count} images; precision and recall need at least {least}")


def open_judge(
    wanted: config.Eval,
    *,
    name: str,
    image_shape: tuple[int, int, int] | None,
    gallery: ImageSet | None = None,
    patch_size: int | None = None,
    cache: epath.PathLike | None = None,
    watched: Callable[[ImageSet | ReferenceFile], ImageSet | ReferenceFile] = lambda images: images,
) -> Judge:
    """The judge that a config section asks for; opened before anything is compiled, so that a missing file is told at once.

    Args:
        wanted: the section.
        name: what a message calls the samples.
        image_shape: theirs, which the reference's must equal; a reference that stores originals is cropped to it. None of
            statistics.
        gallery, patch_size, cache: as of `Judge`.
        watched: what tells how far the reference is read.

    Raises:
        UserError: the reference or the weights are missing, or do not fit the samples or together.
    """
    network = feature_networks.open_network(wanted.features, wanted.weights)
    against = inputs.reference_set(wanted.reference, image_size=None if image_shape is None else image_shape[0])
    options = {"batch_size": wanted.batch_size, "patch_size": patch_size, "cache": cache}
    judge = Judge(network, watched(against), gallery=gallery, **options)
    if image_shape is not None:
        judge.require_size(name, image_shape)
    return judge
