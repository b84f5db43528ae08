"""Class names in pictures: never a box, whatever script they are in."""

import numpy as np
import pytest

from dip_jax.reporting import figures, lettering

NAMES = {
    "Käse": "Käse",
    "Ka\u0308se": "Käse",  # as macOS writes file names
    "Žluťoučký kůň": "Žluťoučký kůň",
    "Ωμέγα": "Ωμέγα",
    "ёжик": "ёжик",
    "two\nlines\tand  gaps": "two lines and gaps",
    "花": "class 6",
    "花 (flower)": "(flower) (class 7)",
    "हाथी": "class 8",
    "שלום": "class 9",
    "🦊": "class 10",
    "(花)": "class 11",
    "": "class 12",
    "bell\x07": "bell (class 13)",
}


@pytest.mark.parametrize("label", range(len(NAMES)), ids=lambda label: ascii(list(NAMES)[label]))
def test_names_in_letters_that_the_font_has(label):
    assert lettering.caption(list(NAMES), label) == list(NAMES.values())[label]


def test_beyond_the_names_lies_no_class():
    assert lettering.caption(["cat"], 1) == "no class"


@pytest.mark.parametrize("label", range(len(NAMES)), ids=lambda label: ascii(list(NAMES)[label]))
def test_no_letter_of_a_caption_is_the_box(label):
    """The box is what a font draws for a code point that is none."""
    font = lettering.font(40)
    box = bytes(font.getmask("\uffff"))
    for letter in lettering.caption(list(NAMES), label):
        assert bytes(font.getmask(letter)) != box
    assert bytes(font.getmask("花")) == box  # the comparison sees one


@pytest.mark.parametrize("name", ["Käse", "花"])
def test_a_picture_shows_the_caption(name):
    shown = figures.Labelled(np.full((1, 32, 32, 3), 250, np.uint8), np.zeros(1, np.int32))
    drawn = np.asarray(figures.class_grid(shown, [name]).convert("L")).astype(int)
    text = lettering.font(15).getmask(lettering.caption([name], 0))
    expected = np.asarray(text, np.uint8).reshape(text.size[::-1])
    rows, columns = np.flatnonzero((drawn < 200).any(axis=1)), np.flatnonzero((drawn < 200).any(axis=0))
    found = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert abs(found.shape[0] - expected.shape[0]) <= 2 and abs(found.shape[1] - expected.shape[1]) <= 2
    ink = 255 - expected.astype(int).mean() * (255 - 30) / 255
    assert abs(found.mean() - ink) < 15
