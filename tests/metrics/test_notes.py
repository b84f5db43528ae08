"""What is said of the order and the numbers of classes, held against the Inception Score itself; and of swapped colours."""

import numpy as np
import pytest

from dip_jax.metrics import notes, statistics
from dip_jax.metrics.image_sets import ImageSet


def labelled(labels):
    return ImageSet("samples", len(labels), (4, 4, 3), lambda size: iter(()), np.asarray(labels))


def order_note(labels):
    return [note for note in notes.class_notes(labelled(labels)) if "in order of their classes" in note]


N, K = 20_000, 10
SORTED, INTERLEAVED = np.arange(N) // (N // K), np.arange(N) % K
BLOCKS = np.arange(N) // 100 % K  # a hundred of a class at a time


@pytest.mark.parametrize(
    "labels, seen",
    [(SORTED, 3), (SORTED[::-1], 3), (SORTED // 5, 1), (np.arange(6000) // 600, 6)],  # the last: splits of 5000 and of 1000
    ids=["rising", "falling", "two", "a short split"],
)
def test_a_sorted_order_is_told_with_what_it_costs(labels, seen):
    """The factor is that by which the score of a network that knows every class falls."""
    (note,) = order_note(labels)
    assert f"a split of 5000 images holds {seen} of {len(np.unique(labels))} classes" in note
    logits = np.full((len(labels), K), -40.0)
    logits[np.arange(len(labels)), labels] = 40.0
    shuffled = np.random.default_rng(0).permutation(len(labels))
    true = statistics.inception_score(logits[shuffled]) / statistics.inception_score(logits)
    told = float(note.split("by up to a factor of ")[1].split(":")[0])
    assert true > 1.8 and told == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(
    "labels",
    [
        INTERLEAVED,
        BLOCKS,
        np.random.default_rng(0).integers(0, K, N),
        np.random.default_rng(1).integers(0, 2000, 50_000),  # few of each in a split, by chance
        np.arange(50_000) % 1000,
        np.arange(5000) // 500,  # one split: its order does not enter
        np.zeros(N, int),
    ],
    ids=["interleaved", "blocks", "random", "2000 random", "1000 interleaved", "one split", "one class"],
)
def test_an_order_that_does_not_matter_is_no_note(labels):
    assert not order_note(labels)


def test_unequal_numbers_are_told():
    (note,) = notes.class_notes(labelled([0] * 5 + [4] * 9 + [7] * 6))
    assert note.startswith("samples: 5 to 9 images per class")
    assert notes.class_notes(labelled(np.arange(11) % 4)) == []  # as equal as 11 of 4 can be
    assert notes.class_notes(ImageSet("samples", 9, (4, 4, 3), lambda size: iter(()))) == []


@pytest.mark.parametrize(
    "ours, theirs, told", [(-20, 20, True), (20, -20, True), (20, 20, False), (-5, 20, False), (0.5, -0.5, False)]
)
def test_swapped_colours(ours, theirs, told):
    rng = np.random.default_rng(0)
    warmth, reference = rng.normal(ours, 30, 400), rng.normal(theirs, 30, 400)
    found = notes.colour_notes(labelled([0]), warmth, reference)
    assert [("red and blue look swapped" in note) for note in found] == [True] * told
