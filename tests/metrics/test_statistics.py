"""Every statistic against its definition in plain numpy, float64, on ordinary and on degenerate vectors."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_jax.metrics import statistics
from dip_jax.metrics.statistics import Gaussian, Moments


def vectors(seed, n, d, *, mean=0.0, rank=None):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(rank or d, d)) / np.sqrt(d)
    return rng.normal(size=(n, rank or d)) @ mix + mean


def moments(rows, *, batch=64):
    total = Moments(rows.shape[1])
    for start in range(0, len(rows), batch):
        total.add(rows[start : start + batch])
    return total.finish()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 200), st.integers(1, 70), st.floats(-1e4, 1e4))
def test_moments_do_not_depend_on_the_batches(n, batch, mean):
    rows = vectors(n, n, 5, mean=mean)
    got = moments(rows, batch=batch)
    np.testing.assert_allclose(got.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12 * max(1.0, abs(mean)))
    assert got.count == n


def test_moments_survive_a_mean_far_above_the_spread():
    rows = vectors(0, 1000, 4) + 1e7
    exact = np.cov(rows - 1e7, rowvar=False)
    np.testing.assert_allclose(moments(rows).covariance, exact, rtol=1e-6)


def test_moments_of_one_vector_have_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        moments(vectors(0, 1, 3))


def test_frechet_distance_is_the_closed_form_for_diagonal_gaussians():
    a = Gaussian(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([0.0, 2.0, 5.0]), np.diag([4.0, 1.0, 0.0]))
    assert statistics.frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (2 - 1) ** 2 + 9, rel=1e-14)


@pytest.mark.parametrize("d", [16, 96])
def test_frechet_distance_equals_the_matrix_square_root(d):
    a, b = moments(vectors(1, 20 * d, d)), moments(vectors(2, 15 * d, d, mean=0.1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    assert statistics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert statistics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n, m, rank", [(10, 12, None), (100, 10, None), (200, 300, 3), (10, 10, 2)])
def test_frechet_distance_of_singular_covariances(n, m, rank):
    """Fewer vectors than dimensions, or duplicated directions: in the span of all vectors nothing is singular twice."""
    rows_a, rows_b = vectors(3, n, 40, rank=rank), vectors(4, m, 40, rank=rank, mean=0.2)
    a, b = moments(rows_a), moments(rows_b)
    # Exact by definition: with X, Y centred and scaled, tr (S1 S2)^(1/2) is the nuclear norm of X Y^T.
    x = (rows_a - rows_a.mean(axis=0)) / np.sqrt(n - 1)
    y = (rows_b - rows_b.mean(axis=0)) / np.sqrt(m - 1)
    shift = rows_a.mean(axis=0) - rows_b.mean(axis=0)
    expected = shift @ shift + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")
    assert statistics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_to_itself_is_zero_and_to_what_is_near_is_not():
    found = []
    for seed in range(20):
        a = moments(vectors(seed, 60, 40) * np.linspace(0.1, 20, 40))
        found.append(statistics.frechet_distance(a, a))
        near = Gaussian(a.mean + 1e-4, a.covariance, a.count)
        assert statistics.frechet_distance(a, near) == pytest.approx(40e-8, rel=1e-3)
    assert found == [0.0] * 20


def test_frechet_distance_of_constant_vectors():
    a, b = moments(np.full((50, 6), 2.0)), moments(np.full((50, 6), 5.0))
    assert statistics.frechet_distance(a, b) == pytest.approx(54.0, rel=1e-14)
    assert statistics.frechet_distance(a, a) == 0.0


def score_by_definition(logits, split):
    scores = []
    for start in range(0, len(logits), split):
        part = logits[start : start + split].astype(np.float64)
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        kl = (p * (np.log(p) - np.log(p.mean(axis=0, keepdims=True)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return np.mean(scores)


@pytest.mark.parametrize("n, split", [(100, 100), (100, 10), (105, 10), (7, 5000)])
def test_inception_score_by_definition(n, split):
    logits = np.random.default_rng(n).normal(size=(n, 11)).astype(np.float32) * 3
    assert statistics.inception_score(logits, split=split) == pytest.approx(score_by_definition(logits, split), rel=1e-12)


def test_inception_score_has_its_bounds_and_feels_the_order():
    one_hot = 200.0 * np.eye(10)[np.arange(100) % 10]
    assert statistics.inception_score(one_hot, split=50) == pytest.approx(10.0)
    assert statistics.inception_score(np.sort(one_hot.argmax(axis=1))[:, None] == np.arange(10), split=10) == pytest.approx(1.0)
    assert statistics.inception_score(np.zeros((20, 10))) == pytest.approx(1.0)


def squared_distances(u, v):
    return ((u.astype(np.float64)[:, None] - v.astype(np.float64)[None]) ** 2).sum(axis=-1)


def radii_by_definition(rows, k):
    distances = squared_distances(rows, rows)
    np.fill_diagonal(distances, -1.0)
    return np.sort(distances, axis=1)[:, k]


def precision_recall_by_definition(samples, references, k):
    across = squared_distances(samples, references)
    precision = (across <= radii_by_definition(references, k)[None]).any(axis=1).mean()
    return precision, (radii_by_definition(samples, k)[None] >= across.T).any(axis=1).mean()


CASES = {
    "normal": lambda rng: (rng.normal(size=(300, 8)), rng.normal(size=(200, 8)) + 0.5),
    "several tiles": lambda rng: (rng.normal(size=(1500, 4)), rng.normal(size=(1100, 4)) * 1.2),
    "a far mean": lambda rng: (rng.normal(size=(150, 8)) + 300.0, rng.normal(size=(150, 8)) + 300.5),
    "ties": lambda rng: (rng.integers(0, 3, (200, 5)), rng.integers(0, 3, (150, 5))),
    "duplicates": lambda rng: (np.repeat(rng.normal(size=(20, 6)), 5, axis=0), np.repeat(rng.normal(size=(30, 6)), 4, axis=0)),
    "constant": lambda rng: (np.full((40, 6), 0.1), np.full((30, 6), 0.1)),
    "the same vectors": lambda rng: (np.eye(30), np.eye(30)),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_precision_and_recall_by_definition(case, k):
    samples, references = (rows.astype(np.float32) for rows in CASES[case](np.random.default_rng(5)))
    got = statistics.precision_recall(samples, references, k=k)
    assert (got.precision, got.recall) == precision_recall_by_definition(samples, references, k)


def test_a_neighbour_too_many():
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        statistics.kth_distances(np.zeros((3, 2), np.float32), k=3)


def test_nearest_accuracy_by_definition():
    rng = np.random.default_rng(0)
    gallery, labels = rng.normal(size=(1300, 3)).astype(np.float32), rng.integers(0, 4, 1300)
    rows, row_labels = rng.normal(size=(1100, 3)).astype(np.float32), rng.integers(0, 4, 1100)
    expected = (labels[squared_distances(rows, gallery).argmin(axis=1)] == row_labels).mean()
    assert statistics.nearest_accuracy(rows, row_labels, gallery, labels) == expected
    assert statistics.nearest_accuracy(gallery, labels, gallery, labels) == 1.0
