"""One image: bytes -> RGB pixels, ADM's centre crop, and the encodings that a dataset may store.

Whatever Pillow reads becomes 8-bit RGB as ADM's loader has it (`convert("RGB")`), so that crops are bit-equal to ADM's:
    greyscale, palette, CMYK   converted;
    alpha                      dropped, not blended: the colours under it show;
    16-bit greyscale           the high byte (Pillow itself would clip at 255);
    animated                   the first frame;
    EXIF orientation           ignored, as ADM does (`turn` does not): a photograph stays as its pixels are stored;
    file extension             ignored: the content decides.
"""

import base64
import contextlib
import io
import zlib
from collections.abc import Iterator

import numpy as np
import PIL
from PIL import ExifTags, Image, TiffImagePlugin

from dip_jax.errors import UserError

# Pillow raises above twice this number, before it decodes a pixel: a few kilobytes can hold gigabytes of them.
MAX_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2

# One black pixel as `encode` stores it.
_TIFF_PIXEL = zlib.decompress(
    base64.b85decode(
        "c-r&y)M5}}U|`VLs{fZEL6QLkxEUB2nHd;?EHFl5GXdGmKzbe!GegA#4l^*YLD@_|EXc?LW^(|sC{!GzM-0gvai|&|AeKQAw?#6C0c-{c0s!<=1~~"
    )
)

# What brings the pixels that a camera stored to where they were seen, by EXIF's orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

EXIF = ("ignore", "rotate")  # what becomes of that orientation
ENCODINGS = ("original", "raw", "tiff", "png", "webp", "jpeg")


class BadImageError(Exception):
    """Bytes that are no usable image; the message is the reason, in one line."""


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image as 8-bit RGB, fully decoded.

    Raises:
        BadImageError: as `load` and `to_rgb`.
    """
    return to_rgb(load(data))


def load(data: bytes) -> Image.Image:
    """The first frame of an encoded image as it is stored, fully decoded.

    Raises:
        BadImageError: for empty, truncated, damaged or unknown data, and for more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise BadImageError("empty file")
    with _told():
        image = Image.open(io.BytesIO(data))
        image.load()
        return image


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image in a format that Pillow reads") from None
    except Exception as error:  # Pillow's plugins raise nearly anything (struct.error, SyntaxError, ...) on damaged bytes
        raise BadImageError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of a loaded image, 1 (upright) to 8; 1 also where it has none or a damaged one."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as of `load`: damaged bytes raise nearly anything
        return 1
    return value if value in range(1, 9) else 1


def turn(image: Image.Image) -> Image.Image:
    """A loaded image as its EXIF orientation says that it is seen."""
    method = _TURNS.get(orientation(image))
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's as 8-bit RGB.

    Raises:
        BadImageError: for pixels without an agreed range.
    """
    with _told():
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BadImageError(f"integers beyond 16 bits (mode {image.mode})")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("floating-point pixels (mode F) have no agreed range")
    if "transparency" in image.info:  # a palette's alpha: spelt out, because Pillow warns otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve (box filter) while the short side is at least 2 * size, bicubic to size, then the centre square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > MAX_PIXELS:  # one pixel high: ADM would fill gigabytes; the same square, without what lies beside it
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def encode(image: Image.Image, encoding: str, *, quality: int) -> bytes:
    """Pixels as stored in a dataset: raw (uint8 rows); tiff, png, webp (lossless); jpeg (`quality`, full colour resolution)."""
    if encoding == "raw":
        return image.tobytes()
    options = {
        # Chosen for the speed of reading, which comes once per epoch. TIFF: differences of neighbours, in one strip, under
        # Zstandard: a third of PNG's time for a tenth more bytes. PNG reads faster the smaller it is, WebP the simpler.
        "tiff": {"compression": "zstd", "tiffinfo": {TiffImagePlugin.PREDICTOR: 2}, "strip_size": MAX_PIXELS * 3},
        "png": {"compress_level": 6},
        "webp": {"lossless": True, "quality": 50, "method": 0},
        "jpeg": {"quality": quality, "subsampling": 0},
    }[encoding]
    buffer = io.BytesIO()
    # Without the colour profile: ADM ignores profiles, and some are larger than the crop.
    image.save(buffer, encoding.upper(), icc_profile=None, **options)
    return buffer.getvalue()


def require_codec(encoding: str) -> None:
    """Proves on one pixel that this Pillow reads an encoding (a failed attempt to write Zstandard can end the process).

    Raises:
        UserError: if not.
    """
    if encoding in ("original", "raw"):
        return
    try:
        pixel = _TIFF_PIXEL if encoding == "tiff" else encode(Image.new("RGB", (1, 1)), encoding, quality=95)
        Image.open(io.BytesIO(pixel)).load()
    except (OSError, KeyError) as error:
        raise UserError(
            f"this Pillow ({PIL.__version__}) has no {encoding} codec ({error}): get one that has with pip install Pillow, "
            "or prepare the dataset with another --encoding"
        ) from None


def pixels(data: bytes, encoding: str, *, image_size: int, stored_size: int | None) -> np.ndarray:
    """Stored bytes -> uint8 [image_size, image_size, 3]; what `encode` and "original" stored is cropped where it must be.

    Raises:
        BadImageError: if the bytes do not hold such an image.
    """
    if encoding == "raw":
        if len(data) != image_size * image_size * 3:
            raise BadImageError(f"{len(data)} bytes are not {image_size}x{image_size}x3 pixels")
        return np.frombuffer(data, np.uint8).reshape(image_size, image_size, 3)
    image = decode(data)
    if stored_size is None:
        image = center_crop(image, image_size)
    if image.size != (image_size, image_size):
        raise BadImageError(f"{image.width}x{image.height} pixels where {image_size}x{image_size} were expected")
    return np.asarray(image)
