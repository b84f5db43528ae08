"""Pictures of every kind, good and bad, as files hold them; and ADM's crop by its description."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from dip_jax.data import photo_crops


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
