"""Images in class folders, whatever else lies there: sorted out by names, the same for a folder and a zip.

An image is what its name says; a class is a sub-folder with an image somewhere below it. All the rest is counted and named.
"""

import os
import posixpath
from collections.abc import Collection
from dataclasses import dataclass, field

from dip_jax.data.sources.split import SPLITS, count
from dip_jax.errors import UserError

# What people's images are called. Pillow reads all but the last three, which are listed as bad rather than passed over.
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".ico", ".heic", ".heif", ".dng"),
)
_SYSTEM = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"})
_SHOWN = 3  # names in a line


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or an operating system's own, by its name without the folders above."""
    return name.startswith(".") or name.lower() in _SYSTEM


@dataclass
class Tree:
    """What lies below a root; paths are relative to it, with "/".

    Attributes:
        images: (path, anything that the source wants back).
        folders: all of them that are not hidden.
        others, hidden, links: files that are no images, hidden things, and links that lead nowhere or in a circle.
        unsafe: names that lead out of the root.
    """

    images: list[tuple[str, int]] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Classes:
    """One split of a tree.

    Attributes:
        classes: sub-folders with images, sorted.
        files: (path below the tree's root, label, what came with the image), sorted by class and path.
        notes: lines about what was left out.
    """

    classes: list[str]
    files: list[tuple[str, int, int]]
    notes: list[str]


def sort_out(tree: Tree, *, name: str) -> dict[str, Classes]:
    """The tree as one split; or as several if all its sub-folders with images are named train, val, validation or test.

    ImageNet's synset folders (n01440764, ...) sorted by name are the standard labels 0-999.

    Args:
        tree: what was found.
        name: the root, for messages.

    Raises:
        UserError: if there is no class, or a split has one that train lacks.
    """
    tops = {path.split("/")[0] for path, _ in tree.images if "/" in path}
    if not tops or not tops <= set(SPLITS):
        return {"train": _classes(tree, "", name=name)}
    if "train" not in tops:
        raise UserError(f"{name} has {', '.join(sorted(tops))} but no train: give the folder whose sub-folders are classes")
    train = _classes(tree, "train", name=name)
    others = {SPLITS[top]: _classes(tree, top, name=name, known=train.classes) for top in sorted(tops - {"train"})}
    return {"train": train, **others}


def _classes(tree: Tree, top: str, *, name: str, known: Collection[str] = ()) -> Classes:
    """What lies below root/top ("" is the root itself)."""
    prefix = f"{top}/" if top else ""
    depth = prefix.count("/")
    inside = [(path, extra) for path, extra in tree.images if path.startswith(prefix)]
    loose = [path for path, _ in inside if path.count("/") == depth]
    found = sorted({path.split("/")[depth] for path, _ in inside if path.count("/") > depth})
    root = posixpath.join(name, top) if top else name
    if not found:
        raise UserError(_no_class(tree, root, loose))
    if foreign := sorted(set(found) - set(known)) if known else ():
        raise UserError(
            f"{root} has the class {foreign[0]!r}, which the train split lacks: the splits must share their classes"
        )
    classes = list(known) or found
    label_of = {one: label for label, one in enumerate(classes)}
    files = [(path, label_of[path.split("/")[depth]], extra) for path, extra in inside if path.count("/") > depth]
    files.sort(key=lambda file: (file[1], file[0]))
    subfolders = {path[len(prefix) :] for path in tree.folders if path.startswith(prefix) and path.count("/") == depth}
    notes = [
        _note(
            f"no class{'' if len(subfolders - set(found)) == 1 else 'es'}",
            sorted(subfolders - set(found)),
            "sub-folder without an image",
            "sub-folders without an image",
        ),
        _note("left out", loose, "image outside the class folders", "images outside the class folders"),
    ]
    if top in ("", "train"):  # once
        notes += [
            _note("left out", tree.others, "file that is no image by its name", "files that are no images by their names"),
            _note("left out", sorted(tree.hidden), "hidden or system file", "hidden or system files"),
            _note(
                "passed over", tree.links, "link that leads nowhere or in a circle", "links that lead nowhere or in a circle"
            ),
            _note("passed over", tree.unsafe, "name that leads out of the archive", "names that lead out of the archive"),
        ]
    return Classes(classes, files, [note for note in notes if note])


def _no_class(tree: Tree, root: str, loose: list[str]) -> str:
    expected = "one sub-folder of images per class is expected"
    if loose:
        found = f"{root} has {count(len(loose), 'image')} and no sub-folder with images"
        return f"{found}: {expected} (or a table of them, --source=csv --from=FILE.csv)"
    if tree.others:
        return f"{root} has no images by their names (it has {tree.others[0]}): {expected}"
    return f"{root} has {'sub-folders but no images in them' if tree.folders else 'no sub-folders'}: {expected}"


def _note(what: str, names: list[str], one: str, several: str) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{what}: {len(names)} {one if len(names) == 1 else several} ({', '.join(names[:_SHOWN])}{more})"
