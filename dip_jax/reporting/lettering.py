"""Names of classes as a picture can show them: in a font that comes with matplotlib, and in words for what that font lacks.

DejaVu Sans has Latin with all its accents, Greek, Cyrillic, Armenian, Georgian and many signs. It has no Chinese, Japanese,
Korean or Indic script, and what runs from right to left would come out in the wrong order: such letters are left out and the
class's number is named, for a box says nothing.
"""

import functools
import importlib.util
import os
import unicodedata
from collections.abc import Sequence

from PIL import ImageFont


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all text in pictures, `size` pixels high."""
    return ImageFont.truetype(_file(), size)


def caption(names: Sequence[str], label: int) -> str:
    """The name of a class in letters that `font` has; "class 7", or "Lily (class 7)", where it lacks some of them.

    Args:
        names: of all classes; a label beyond them is the null class, "no class".
        label: which.
    """
    if label >= len(names):
        return "no class"
    name = " ".join(unicodedata.normalize("NFC", names[label]).split())
    shown = " ".join("".join(letter if _is_drawable(letter) else " " for letter in name).split())
    if shown == name and name:
        return name
    return f"{shown} (class {label})" if any(map(str.isalnum, shown)) else f"class {label}"


def _is_drawable(letter: str) -> bool:
    return ord(letter) in _charmap() and unicodedata.bidirectional(letter) not in ("R", "AL")


def _file() -> str:
    package = importlib.util.find_spec("matplotlib").origin
    return os.path.join(os.path.dirname(package), "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")


@functools.cache
def _charmap() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_file()).get_charmap())
