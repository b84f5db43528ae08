"""Arrays of images, and what is said of those in another form: the expression in the message must make pixels of them."""

import re

import numpy as np
import pytest

from dip_jax.errors import UserError
from dip_jax.metrics import image_sets

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
PIXELS[0, 0, 0], PIXELS[0, 0, 1] = 0, 255
GREY = PIXELS[..., :1].repeat(3, axis=3)


def test_arrays_of_other_pixels_have_other_fingerprints():
    other = PIXELS.copy()
    other[0, 0, 0, 0] ^= 1
    assert image_sets.from_array(PIXELS).fingerprint != image_sets.from_array(other).fingerprint


FORMS = {
    "channels first": (PIXELS.transpose(0, 3, 1, 2), PIXELS),
    "alpha": (np.concatenate([PIXELS, PIXELS[..., :1]], axis=3), PIXELS),
    "alpha, channels first": (np.concatenate([PIXELS, PIXELS[..., :1]], axis=3).transpose(0, 3, 1, 2), PIXELS),
    "one channel": (PIXELS[..., :1], GREY),
    "no channel": (PIXELS[..., 0], GREY),
    "float 0..1": (PIXELS.astype(np.float32) / 255, PIXELS),
    "half -1..1": ((PIXELS.astype(np.float64) / 127.5 - 1).astype(np.float16), None),
    "double -1..1": (PIXELS.astype(np.float64) / 127.5 - 1, PIXELS),
    "-1..1 and a little beyond": (PIXELS.astype(np.float64) / 127.5 * 1.02 - 1.02, None),
    "float 0..255": (PIXELS.astype(np.float32), PIXELS),
    "int64": (PIXELS.astype(np.int64), PIXELS),
    "float -1..1, channels first": (PIXELS.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1, PIXELS),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_expression_in_the_message_mends_the_array(form):
    given, expected = FORMS[form]
    with pytest.raises(UserError) as error:
        image_sets.from_array(given, name="x")
    message = str(error.value)
    assert f"x holds {given.dtype} {list(given.shape)}" in message and "\n" not in message
    if given.dtype != np.uint8:
        low, high = re.search(r"with values from (\S+) to (\S+),", message).groups()
        assert float(low) == pytest.approx(given.min(), rel=1e-3) and float(high) == pytest.approx(given.max(), rel=1e-3)
    mended = eval(message.split(": save ")[1], {"np": np, "x": given})
    assert image_sets.from_array(mended).count == 7
    if expected is not None:
        np.testing.assert_array_equal(mended, expected)


@pytest.mark.parametrize(
    "given",
    [PIXELS.astype(np.float32) * 3, PIXELS.astype(np.int16) - 9, np.full((7, 5, 6, 3), np.nan), np.ones((7, 5, 6, 3), bool)],
    ids=["up to 765", "below 0", "nan", "bool"],
)
def test_values_without_a_rule_are_not_given_one(given):
    with pytest.raises(UserError, match=r"follow no rule that is known here$"):
        image_sets.from_array(given)


@pytest.mark.parametrize("shape", [(0, 5, 6, 3), (7, 0, 6, 3), (7, 5, 6, 9), (7, 90), (7,)])
def test_shapes_that_are_no_images(shape):
    with pytest.raises(
        UserError, match=re.escape(f"{list(shape)}, expected uint8 [N, H, W, 3] of pixels 0..255 and at least one")
    ):
        image_sets.from_array(np.zeros(shape, np.uint8))
