"""A zip with a sub-folder of images per class, read where it is: no file is written, and none is larger than it says."""

import contextlib
import dataclasses
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dip_jax.data.sources.split import Item
from dip_jax.data.sources.tree import Tree, is_hidden, is_image_name, sort_out
from dip_jax.errors import UserError

MOST_BYTES = 1 << 30  # of one file: more are not an image that `images.MAX_PIXELS` lets through
_ENCRYPTED, _UTF8 = 0x1, 0x800  # bits of a member's flags
_LOCAL = struct.Struct("<4s22xHH")  # magic; lengths of name and extra field: what lies before a member's bytes
_ENTRY = np.dtype([("offset", "i8"), ("stored", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "i4"), ("label", "i4")])


@dataclass(frozen=True)
class ZipSplit:
    """Members of a zip. The numbers are an array: a million members are tens of megabytes."""

    path: pathlib.Path
    classes: list[str]
    names: list[str]
    entries: np.ndarray  # _ENTRY
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Item:
        data, problem = _read(self.path, self.entries[i])
        return Item(self.names[i], data, int(self.entries[i]["label"]), problem)

    def part(self, start: int, stop: int) -> "ZipSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, names=self.names[start:stop], entries=self.entries[start:stop])

    def listing(self) -> Iterator[tuple[str, str]]:
        """Names with sizes and checksums."""
        for name, entry in zip(self.names, self.entries, strict=True):
            yield name, f"{entry['size']} {entry['crc']:08x}"


def _read(path: pathlib.Path, entry: np.void) -> tuple[bytes, str]:
    """(bytes, "") of a member, or (b"", what is wrong with it)."""
    if entry["size"] > MOST_BYTES:
        return b"", f"{entry['size']} bytes are too many for an image"
    with open(path, "rb") as file:
        file.seek(entry["offset"])
        head = file.read(_LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
            return b"", "damaged zip member (no header where it should be)"
        _, name, extra = _LOCAL.unpack(head)
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(min(int(entry["stored"]), MOST_BYTES))
    if entry["method"] == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(entry["size"]) + 1)
        except zlib.error as error:
            return b"", f"damaged zip member ({error})"
    elif entry["method"] != zipfile.ZIP_STORED:
        return b"", f"compressed by zip's method {entry['method']}: only stored and deflated members are read"
    if len(data) != entry["size"] or zlib.crc32(data) != entry["crc"]:
        return b"", "damaged zip member (wrong checksum)"
    return data, ""


def open_zip(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, ZipSplit]:
    """The zip as a folder would be: `tree.sort_out`. A single folder around all class folders is looked through.

    Raises:
        UserError: if there is no such zip, it is damaged or encrypted, or as `tree.sort_out`.
    """
    del argument, image_size, scratch
    if not root:
        raise UserError("--source=zip needs --from=FILE.zip, with one sub-folder of images per class")
    path = pathlib.Path(root).expanduser().absolute()
    if not path.is_file():
        raise UserError(f"--from={root} is no file: give a zip with one sub-folder of images per class")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}): fetch or pack it again") from None
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            raise UserError(f"{path} is encrypted ({member.filename}): unpack it with its password, then --source=folder")
    if sum(member.compress_size for member in members) > path.stat().st_size:
        raise UserError(f"{path} says that its members hold more bytes than it has (a zip bomb): it is not read")
    tree = _sorted_in(members)
    splits = sort_out(_unwrapped(tree), name=os.fspath(path))
    return {name: _split(path, found.classes, found.files, found.notes, members) for name, found in splits.items()}


def _split(path, classes, files, notes, members) -> ZipSplit:
    entries = np.empty(len(files), _ENTRY)
    for i, (_, label, k) in enumerate(files):
        member = members[k]
        stored, method = member.compress_size, member.compress_type
        entries[i] = (member.header_offset, stored, member.file_size, member.CRC, method, label)
    return ZipSplit(path, classes, [name for name, _, _ in files], entries, notes)


def _sorted_in(members: list[zipfile.ZipInfo]) -> Tree:
    """The members as a tree; an image comes with its place in the list."""
    tree = Tree()
    for k, member in enumerate(members):
        name = _name(member)
        parts = name.rstrip("/").split("/")
        if name.startswith("/") or ".." in parts or "" in parts:
            tree.unsafe.append(name)
            continue
        hidden = [i for i, part in enumerate(parts) if is_hidden(part)]
        folders = parts if name.endswith("/") else parts[:-1]
        if hidden:
            tree.hidden.add("/".join(parts[: hidden[0] + 1]))
            continue
        tree.folders |= {"/".join(folders[:depth]) for depth in range(1, min(len(folders), 4) + 1)}
        if name.endswith("/"):
            continue
        if (member.external_attr >> 28) == 0xA:  # a symbolic link of Unix
            tree.links.append(name)
        elif is_image_name(name):
            tree.images.append((name, k))
        else:
            tree.others.append(name)
    return tree


def _name(member: zipfile.ZipInfo) -> str:
    """The name as it was meant: macOS writes UTF-8 without saying so, some of Windows' packers backslashes."""
    name = member.filename
    if not member.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _unwrapped(tree: Tree) -> Tree:
    """The tree inside the one folder that holds everything, while there is one with images in its sub-folders alone."""
    tops = {path.split("/")[0] for path, _ in tree.images}
    if len(tops) != 1 or any(path.count("/") < 2 for path, _ in tree.images):
        return tree
    (top,) = tops
    prefix = f"{top}/"
    inner = dataclasses.replace(
        tree,
        images=[(path.removeprefix(prefix), k) for path, k in tree.images],
        folders={path.removeprefix(prefix) for path in tree.folders if path != top},
    )
    return _unwrapped(inner)
