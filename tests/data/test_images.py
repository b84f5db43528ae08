"""Crops bit-equal to ADM's, and every kind of odd or bad image."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dip_jax.data import images, photo_crops
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


def photograph(width: int, height: int) -> Image.Image:
    """A photograph at this size, stretched."""
    return photo_crops.load_photograph("coffee").resize((width, height), Image.Resampling.LANCZOS)


def adm_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's description, literally: on arrays, with slices, in one loop."""
    height, width, _ = pixels.shape
    while min(height, width) >= size * 2:
        height, width = height // 2, width // 2
        pixels = np.array(Image.fromarray(pixels).resize((width, height), resample=Image.BOX))
    factor = size / min(height, width)
    pixels = np.array(Image.fromarray(pixels).resize((round(width * factor), round(height * factor)), resample=Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [64, 256])
def test_crop_is_bit_equal_to_adm(shape, size):
    image = photograph(*shape)
    np.testing.assert_array_equal(np.asarray(images.center_crop(image, size)), adm_crop(np.asarray(image), size))


def test_crop_of_an_image_of_that_size_changes_nothing():
    image = photograph(64, 64)
    np.testing.assert_array_equal(np.asarray(images.center_crop(image, 64)), np.asarray(image))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that says it has 20,000 x 20,000 pixels, in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def good_kinds() -> dict[str, tuple[bytes, np.ndarray]]:
    """Kinds that convert: bytes, and the RGB pixels that must come out."""
    rgb = photograph(96, 80)
    pixels = np.asarray(rgb)
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray((np.arange(96 * 80) % 256).astype(np.uint8).reshape(80, 96)))
    palette = rgb.quantize(64)
    clear = palette.copy()
    deep = np.asarray(grey).astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: ADM ignores it, and so do we
    jpeg = encoded(rgb, "JPEG", quality=90)
    cmyk = encoded(rgb.convert("CMYK"), "JPEG", quality=100)
    return {
        "png": (encoded(rgb, "PNG"), pixels),
        "jpeg": (jpeg, np.asarray(Image.open(io.BytesIO(jpeg)))),
        "grey": (encoded(grey, "PNG"), np.asarray(grey.convert("RGB"))),
        "grey_alpha": (encoded(grey.convert("LA"), "PNG"), np.asarray(grey.convert("RGB"))),
        "alpha": (encoded(alpha, "PNG"), pixels),
        "palette": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette_transparent": (encoded(clear, "PNG", transparency=bytes(range(64))), np.asarray(palette.convert("RGB"))),
        "cmyk": (cmyk, np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB"))),
        "16_bit": (encoded(Image.fromarray(deep), "PNG"), np.asarray(grey.convert("RGB"))),
        "bilevel": (encoded(rgb.convert("1"), "PNG"), np.asarray(rgb.convert("1").convert("RGB"))),
        "exif_rotated": (encoded(rgb, "PNG", exif=exif), pixels),
        "animated_gif": (
            encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)] * 3),
            np.asarray(palette.convert("RGB")),
        ),
        "webp": (encoded(rgb, "WEBP", lossless=True), pixels),
        "one_pixel_high": (encoded(rgb.crop((0, 0, 96, 1)), "PNG"), pixels[:1]),
    }


def bad_kinds() -> dict[str, tuple[bytes, str]]:
    """Kinds that cannot be used: bytes, and a part of the reason."""
    png, jpeg = (encoded(photograph(96, 80), form) for form in ("PNG", "JPEG"))
    return {
        "empty": (b"", "empty"),
        "text": (b"<html>404</html>", "not an image"),
        "truncated_png": (png[: len(png) // 2], "truncated"),
        "truncated_jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zeroed": (b"\0" * 500, "not an image"),
        "flipped_png": (png[:200] + bytes([png[200] ^ 255]) + png[201:], "Error"),
        "bomb": (bomb(), "decompression bomb"),
        "float": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floating"),
    }


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
