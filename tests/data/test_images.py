"""Crops bit-equal to ADM's, and every kind of odd or bad image."""

import numpy as np
import pytest
from pictures import adm_crop, bad_kinds, encoded, good_kinds, photograph
from PIL import Image

from dip_jax.data import images
from dip_jax.errors import UserError

SIZES = [
    (100, 80),
    (80, 100),
    (333, 257),
    (511, 512),
    (512, 512),
    (500, 375),
    (1023, 511),
    (901, 1601),
    (4000, 3000),
    (3001, 3999),
]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [64, 256])
def test_crop_is_bit_equal_to_adm(shape, size):
    image = photograph(*shape)
    np.testing.assert_array_equal(np.asarray(images.center_crop(image, size)), adm_crop(np.asarray(image), size))


def test_crop_of_an_image_of_that_size_changes_nothing():
    image = photograph(64, 64)
    np.testing.assert_array_equal(np.asarray(images.center_crop(image, 64)), np.asarray(image))


@pytest.mark.parametrize("kind", good_kinds())
def test_odd_images_convert_as_adm_converts_them(kind):
    data, expected = good_kinds()[kind]
    image = images.decode(data)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert np.asarray(images.center_crop(image, 32)).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", bad_kinds())
def test_bad_images_are_one_line_of_reason(kind):
    data, reason = bad_kinds()[kind]
    with pytest.raises(images.BadImageError, match=reason) as error:
        images.decode(data)
    assert "\n" not in str(error.value)


def test_a_line_of_pixels_crops_without_filling_the_memory():
    line = Image.fromarray(np.tile(np.arange(3_000_000) // 12_000, (1, 1)).astype(np.uint8)).convert("RGB")
    crop = np.asarray(images.center_crop(line, 256))
    assert crop.shape == (256, 256, 3)
    assert set(np.unique(crop)) <= {124, 125}  # the middle


@pytest.mark.parametrize("encoding", ["raw", "tiff", "png", "webp"])
def test_lossless_encodings_give_the_pixels_back(encoding):
    image = photograph(64, 64)
    data = images.encode(image, encoding, quality=90)
    np.testing.assert_array_equal(images.pixels(data, encoding, image_size=64, stored_size=64), np.asarray(image))


def test_jpeg_is_near_and_nearer_at_higher_quality():
    image = photograph(64, 64)
    errors = []
    for quality in (50, 98):
        stored = images.pixels(images.encode(image, "jpeg", quality=quality), "jpeg", image_size=64, stored_size=64)
        errors.append(np.abs(stored.astype(float) - np.asarray(image)).mean())
    assert errors[1] < errors[0] and errors[1] < 2


def test_originals_are_cropped_when_read():
    image = photograph(200, 150)
    pixels = images.pixels(encoded(image, "PNG"), "original", image_size=64, stored_size=None)
    np.testing.assert_array_equal(pixels, adm_crop(np.asarray(image), 64))


@pytest.mark.parametrize("encoding", ["raw", "tiff"])
def test_a_stored_image_of_another_size_is_bad(encoding):
    data = images.encode(photograph(32, 32), encoding, quality=90)
    with pytest.raises(images.BadImageError, match="64x64"):
        images.pixels(data, encoding, image_size=64, stored_size=64)


@pytest.mark.parametrize("encoding", images.ENCODINGS)
def test_this_pillow_has_every_codec(encoding):
    images.require_codec(encoding)


def test_a_pillow_without_the_codec_is_told_in_one_line(monkeypatch):
    other = images._TIFF_PIXEL.replace((50000).to_bytes(2, "little"), (34676).to_bytes(2, "little"))  # SGILog: not for RGB
    assert other != images._TIFF_PIXEL
    monkeypatch.setattr(images, "_TIFF_PIXEL", other)
    with pytest.raises(UserError, match=r"no tiff codec.*pip install Pillow"):
        images.require_codec("tiff")


@pytest.mark.parametrize("encoding", ["tiff", "png", "webp", "jpeg"])
def test_a_colour_profile_is_not_stored(encoding):
    image = photograph(32, 32)
    plain = images.encode(image, encoding, quality=90)
    image.info["icc_profile"] = b"profile" * 1000
    assert images.encode(image, encoding, quality=90) == plain
