"""Writes named float32 arrays as a file that `torch.load(FILE, weights_only=True)` reads, without torch.

The zip format of torch >= 1.6: one stored record per tensor, and `data.pkl`, a pickle that makes a mapping from names to views
of these records. It needs a dozen opcodes of pickle's protocol 2, written here one by one.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterable

import numpy as np


def torch_bytes(tensors: Iterable[tuple[str, np.ndarray]]) -> bytes:
    """The file's bytes, the same for the same tensors; reads back as a dict of contiguous float32 tensors on the CPU."""
    file, entries = io.BytesIO(), []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, tensor) in enumerate(tensors):
            archive.writestr(_record(f"data/{key}"), np.asarray(tensor, "<f4").tobytes())
            entries.append(_text(name) + _tensor(str(key), tensor.shape))
        # PROTO 2, EMPTY_DICT, MARK, names and tensors in turn, SETITEMS, STOP
        archive.writestr(_record("data.pkl"), b"\x80\x02}(" + b"".join(entries) + b"u.")
        archive.writestr(_record("byteorder"), "little")
        archive.writestr(_record("version"), "3\n")
    return file.getvalue()


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")  # stored, and without today's date


def _tensor(key: str, shape: tuple[int, ...]) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)"""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    storage = _tuple(_text("storage"), _global("torch", "FloatStorage"), _text(key), _text("cpu"), _int(math.prod(shape)))
    hooks = _global("collections", "OrderedDict") + b")R"  # EMPTY_TUPLE, REDUCE
    arguments = storage + b"Q", _int(0), _tuple(*map(_int, shape)), _tuple(*map(_int, strides)), b"\x89", hooks
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(*arguments) + b"R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of 8 bytes: a storage may have more than 2^31 values


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"
