"""The statistics behind every number: moments, Frechet distance, Inception Score, precision and recall, nearest neighbours.

    (1)  FID  = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                        Heusel et al. 2017
    (2)  tr (S1 S2)^(1/2) = sum of the singular values of R1^T R2,  S = R R^T
    (3)  IS   = mean over splits of exp(mean_x KL(p(y|x) || p(y)))                      Salimans et al. 2016
    (4)  precision = share of samples inside the union of balls around the references, where a ball reaches to its centre's
         k-th neighbour among the references; recall = the same with the roles swapped   Kynkaanniemi et al. 2019

Moments and decompositions are taken on the host in float64. Distances are taken on the device in float32 tiles, so their
memory does not grow with the number of vectors. (2) needs no square root of a general matrix: it is exact for singular
covariances too, where that root is not.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

TILE = 1024  # rows and columns of one tile of distances
SPLIT = 5000  # samples per split of the Inception Score, as in the ADM evaluator
_FAR = 1e37  # squared distance of padding
NEIGHBOURS = 3  # k of (4), as in the ADM evaluator


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] in float64; the number of vectors behind them, None where a file does not say."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class Moments:
    """Mean and covariance of vectors that arrive in batches; the memory is that of a few d x d matrices.

    Blocks of vectors are centred on their own mean before their products are summed, and merge by the pairwise update of Chan,
    Golub & LeVeque (1983), so nothing is lost where the mean is large against the spread.
    """

    def __init__(self, dimension: int):
        self._count = 0
        self._mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Takes vectors [n, dimension] of any float type."""
        self._waiting.append(np.asarray(rows, np.float64))
        if sum(map(len, self._waiting)) >= TILE:  # few large products instead of many small ones
            self._merge()

    def _merge(self) -> None:
        rows = np.concatenate(self._waiting)
        self._waiting = []
        mean = rows.mean(axis=0)
        total = self._count + len(rows)
        shift = mean - self._mean
        weight = np.sqrt(self._count * len(rows) / total)
        centred = np.concatenate([rows - mean, shift[None] * weight])
        self._scatter += centred.T @ centred
        self._mean += shift * (len(rows) / total)
        self._count = total

    def finish(self) -> Gaussian:
        """The mean and the unbiased covariance (divided by count - 1); at least two vectors are needed."""
        if self._waiting:
            self._merge()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, not {self._count}")
        return Gaussian(self._mean.copy(), self._scatter / (self._count - 1), self._count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Equation (1) by (2): the distance between two Gaussians, at least 0: what rounding alone can leave is 0.

    With no more vectors than dimensions it is biased upwards; compare it then only with distances of the same counts.
    """
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    shift = a.mean - b.mean
    sizes = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance)
    distance = float(sizes - 2 * overlap)
    return distance if distance > sizes * len(shift) * np.finfo(np.float64).eps else 0.0


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [d, rank] with R R^T = S. Eigenvalues within rounding of zero are dropped: their roots would be pure noise."""
    values, vectors = np.linalg.eigh(covariance)
    keep = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def inception_score(logits: np.ndarray, *, split: int = SPLIT) -> float:
    """Equation (3) over contiguous runs of `split` of the [n, classes] logits; between 1 and the number of classes.

    The order of the rows matters: class-sorted samples score far too low. The last run is shorter where n does not divide.
    """
    scores = []
    for start in range(0, len(logits), split):
        x = np.asarray(logits[start : start + split], np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Equation (4): the share of samples that look real, the share of the real that the samples cover; each in [0, 1]."""

    precision: float
    recall: float


def precision_recall(samples: np.ndarray, references: np.ndarray, *, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Equation (4) on features [n, d] and [m, d] with n, m > k; balls are Euclidean and closed.

    Distances are float32. The ADM evaluator takes them in float16 and falls back to float32 where that overflows, so its
    value differs by the few vectors that lie within float16's rounding of a ball's surface.
    """
    origin = references[0]
    return PrecisionRecall(
        precision=float(_inside(samples, references, kth_distances(references, k=k), origin).mean()),
        recall=float(_inside(references, samples, kth_distances(samples, k=k, origin=origin), origin).mean()),
    )


def kth_distances(rows: np.ndarray, *, k: int, origin: np.ndarray | None = None) -> np.ndarray:
    """Squared Euclidean distance [n] of every vector [n, d] to its k-th nearest other vector, n > k >= 1.

    `origin` [d], by default the first vector, is subtracted from all: float32 then resolves distances, not norms.
    """
    if len(rows) <= k:
        raise ValueError(f"{len(rows)} vectors have no {k}-th neighbour")
    origin = rows[0] if origin is None else origin
    out = []
    for tile in _tiles(rows, origin):
        nearest = jnp.full((TILE, k + 1), jnp.inf, jnp.float32)  # each vector is its own nearest, at distance 0
        for other in _tiles(rows, origin):
            nearest.block_until_ready()  # else tiles queue up, and the memory grows with the number of vectors
            nearest = _merge_nearest(nearest, tile.rows, tile.norms, other.rows, other.norms, tile.start == other.start)
        out.append(np.asarray(nearest[: tile.count, k]))
    return np.concatenate(out)


def nearest_accuracy(rows: np.ndarray, labels: np.ndarray, gallery: np.ndarray, gallery_labels: np.ndarray) -> float:
    """Share of the vectors [n, d] whose nearest vector of the gallery [m, d] has the same label ([n], [m])."""
    origin, right = gallery[0], 0
    for tile in _tiles(rows, origin):
        distance, index = np.full(TILE, np.inf, np.float32), np.zeros(TILE, np.int64)
        for other in _tiles(gallery, origin):
            here, where = map(np.asarray, _nearest(tile.rows, tile.norms, other.rows, other.norms))
            index = np.where(here < distance, where + other.start, index)
            distance = np.minimum(here, distance)
        right += int((gallery_labels[index[: tile.count]] == labels[tile.start : tile.start + tile.count]).sum())
    return right / len(rows)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """TILE vectors, the first `count` of them real; the padding is further from everything than anything real."""

    start: int
    count: int
    rows: np.ndarray
    norms: np.ndarray


def _tiles(rows: np.ndarray, origin: np.ndarray) -> Iterator[_Tile]:
    for start in range(0, len(rows), TILE):
        block = rows[start : start + TILE].astype(np.float32) - origin.astype(np.float32)
        padded = np.zeros((TILE, rows.shape[1]), np.float32)
        padded[: len(block)] = block
        norms = np.full(TILE, _FAR, np.float32)
        norms[: len(block)] = np.einsum("nd,nd->n", block, block, dtype=np.float64)
        yield _Tile(start, len(block), padded, norms)


def _inside(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Which of the rows [n] lie within the squared radius [m] of at least one centre."""
    out = []
    for tile in _tiles(rows, origin):
        hit = jnp.zeros((TILE,), bool)
        for ball in _tiles(centres, origin):
            radius = np.full(TILE, -1.0, np.float32)
            radius[: ball.count] = radii[ball.start : ball.start + ball.count]
            hit.block_until_ready()
            hit = _merge_inside(hit, tile.rows, tile.norms, ball.rows, ball.norms, radius)
        out.append(np.asarray(hit[: tile.count]))
    return np.concatenate(out)


def _distances(u: jax.Array, u_norms: jax.Array, v: jax.Array, v_norms: jax.Array) -> jax.Array:
    """Squared distances [n, m]. Those within rounding of 0 are 0, so that equal vectors are at distance 0."""
    norms = u_norms[:, None] + v_norms[None]
    product = jnp.matmul(u, v.T, precision=jax.lax.Precision.HIGHEST)
    distances = norms - 2 * product
    return jnp.where(distances > norms * 2.0**-20, distances, 0.0)


@jax.jit
def _merge_nearest(nearest, u, u_norms, v, v_norms, same):
    distances = _distances(u, u_norms, v, v_norms)
    distances = jnp.where(jnp.eye(TILE, dtype=bool) & same, 0.0, distances)
    candidates = jnp.concatenate([nearest, distances], axis=1)
    return -jax.lax.top_k(-candidates, nearest.shape[1])[0]


@jax.jit
def _merge_inside(hit, u, u_norms, v, v_norms, radii):
    return hit | (_distances(u, u_norms, v, v_norms) <= radii[None]).any(axis=1)


@jax.jit
def _nearest(u, u_norms, v, v_norms):
    distances = _distances(u, u_norms, v, v_norms)
    return distances.min(axis=1), distances.argmin(axis=1)
