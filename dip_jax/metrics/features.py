"""From images to what the statistics need: the table of feature networks, and one pass over a set of images."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dip_jax.config.checks import one_of
from dip_jax.errors import UserError
from dip_jax.metrics import inception, lite0
from dip_jax.metrics.image_sets import ImageSet
from dip_jax.metrics.statistics import Gaussian, Moments

KEPT = 10_000  # vectors of a reference that precision, recall and nearest neighbours use, spread evenly over it


@dataclass(frozen=True)
class Network:
    """A feature network with its weights.

    Attributes:
        name: row of `NETWORKS`.
        suffix: what its metrics' names end in; "" only for the network that published numbers use.
        digest: SHA-256 of the weights file.
        apply: uint8 [B, H, W, 3] -> float32 "pool" [B, d], "logits" [B, classes] and, where it has them, "spatial" [B, s].
        input: how images of H x W enter, in words, for the protocol.
        dimensions: widths d and s by name.
    """

    name: str
    suffix: str
    digest: str
    apply: Callable[[jax.Array], dict[str, jax.Array]]
    input: Callable[[int, int], str]
    dimensions: dict[str, int]


def _open_lite0(weights: str) -> Network:
    if weights:
        raise UserError(f"weights={weights}: features=lite0 brings its own weights; drop the option, or use features=inception")

    def describe(height: int, width: int) -> str:
        size = lite0.input_size(height, width)
        return f"{size}x{size} by {lite0.RESIZE}, (v / 255 - 0.5) / 0.5"

    apply = functools.partial(lite0.features, lite0.load())
    return Network("lite0", "_lite0", lite0.digest(), apply, describe, {"pool": lite0.DIMENSION})


def _open_inception(weights: str) -> Network:
    def describe(height: int, width: int) -> str:
        size = inception.SIZE
        resized = f"{size}x{size}" if (height, width) == (size, size) else f"{size}x{size} by {inception.RESIZE}"
        return f"{resized}, (v - 128) / 128"

    params = inception.load(weights)
    apply = functools.partial(inception.features, params)
    return Network("inception", "", inception.digest(weights), apply, describe, inception.DIMENSIONS)


NETWORKS: dict[str, Callable[[str], Network]] = {"inception": _open_inception, "lite0": _open_lite0}


def require_known(key: str, name: str) -> None:
    """Raises `UserError`, which calls the value `key`, where `NETWORKS` has no such row."""
    one_of(key, name, NETWORKS)


@functools.lru_cache(maxsize=2)
def open_network(name: str, weights: str = "") -> Network:
    """A feature network by its name in `NETWORKS`; `weights` is the user's file for the one that brings none.

    Raises:
        UserError: the name is unknown, or the weights are missing, damaged or not of this network.
    """
    require_known("features", name)
    return NETWORKS[name](weights)


@dataclass(frozen=True)
class Summary:
    """What is kept of a set of images.

    Attributes:
        count: images in the set.
        gaussians: moments over all images, of "pool" and, where the network has it, of "spatial".
        vectors: float32 [n, d], pool features of the images `kept`.
        kept: their indices [n], rising.
        warmth: float64 [N], mean red minus mean blue of all images.
        logits: float32 [N, classes] of all images; None where not asked for.
    """

    count: int
    gaussians: dict[str, Gaussian]
    vectors: np.ndarray
    kept: np.ndarray
    warmth: np.ndarray
    logits: np.ndarray | None = None


def summarise(
    network: Network, images: ImageSet, *, batch_size: int, keep: int | None = None, with_logits: bool = False
) -> Summary:
    """Features of all images, in one pass and one compilation, spread over this process's devices.

    Args:
        network, images: of which.
        batch_size: images per call; the last batch is padded.
        keep: pool features to keep, spread evenly over the set; None keeps all.
        with_logits: keep all logits too.

    Raises:
        UserError: a set of fewer than two images, or one that yields another number than it announced.
    """
    if images.count < 2:
        raise UserError(f"{images.name} holds {images.count} image; a covariance needs at least 2")
    kept = np.arange(images.count) if keep is None else np.unique(np.linspace(0, images.count - 1, keep).astype(np.int64))
    wanted = np.zeros(images.count, bool)
    wanted[kept] = True
    moments = {name: Moments(width) for name, width in network.dimensions.items()}
    vectors, logits, warmth, seen = [], [], [], 0

    def batches() -> Iterator[np.ndarray]:
        for batch in images.batches(batch_size):
            red, _, blue = np.moveaxis(batch.mean(axis=(1, 2), dtype=np.float64), -1, 0)
            warmth.append(red - blue)
            yield batch

    for out in _activations(network, batches(), batch_size):
        for name, total in moments.items():
            total.add(out[name])
        rows = len(out["pool"])
        vectors.append(out["pool"][wanted[seen : seen + rows]])
        if with_logits:
            logits.append(out["logits"])
        seen += rows
    if seen != images.count:
        raise UserError(f"{images.name} announced {images.count} images and gave {seen}; make it again")
    gaussians = {name: total.finish() for name, total in moments.items()}
    all_logits = np.concatenate(logits) if with_logits else None
    return Summary(seen, gaussians, np.concatenate(vectors), kept, np.concatenate(warmth), all_logits)


def _activations(network: Network, batches: Iterator[np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """The network's outputs for each batch, without padding; while one is fetched the next one runs."""
    devices = jax.local_devices()
    size = -(-size // len(devices)) * len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    running: tuple[int, Any] | None = None
    for batch in itertools.chain(batches, [None]):
        started = None
        if batch is not None:
            padded = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), np.uint8)])
            with jax.set_mesh(mesh):  # a run around it may have set one that spans other hosts
                started = len(batch), network.apply(jax.device_put(padded, spread))
        if running is not None:
            yield {name: np.asarray(value)[: running[0]] for name, value in running[1].items()}
        running = started
