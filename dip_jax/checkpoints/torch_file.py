"""Reads the tensors of PyTorch and safetensors files, without torch and without executing anything that a file pickles.

A torch file is a pickle beside raw storages. The pickle is read by an unpickler to which every name is either one of the few
data constructors that tensors need, replaced by ours, or an inert placeholder that swallows whatever it is given (what a
training framework saves beside the weights), or, from Python's own library, a reason to refuse the file.
"""

import collections
import dataclasses
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from dip_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file saved before torch 1.6 (or with the zip format off)
_MAX_NODES = 4_000_000  # objects visited while looking for tensors; a file above it is not a checkpoint

# torch's storage classes -> numpy's dtype names. Strings, since a pickle can call methods of what it is handed.
_DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"}
_DTYPES |= {"Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Untyped": "uint8"}
_GLOBALS: dict[str, Any] = {
    **{f"{module}.{name}Storage": dtype for module in ("torch", "torch.storage") for name, dtype in _DTYPES.items()},
    **{f"torch.{name}": name for name in (*_DTYPES.values(), "float8_e4m3fn", "float8_e5m2")},
}

_SAFETENSORS = {
    **{f"F{8 * n}": f"float{8 * n}" for n in (2, 4, 8)},
    **{f"I{8 * n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U8": "uint8",
    "BOOL": "bool",
}

# Names of the standard library that checkpoints hold and that only build data; any other one is refused.
_HARMLESS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "builtins": "object list dict tuple int float str bool bytearray complex slice",
        "__builtin__": "object list dict tuple int float str bool bytearray complex slice unicode long",
        "collections": "Counter defaultdict deque",
        "copyreg": "_reconstructor",
        "copy_reg": "_reconstructor",
        "datetime": "date datetime timedelta",
        "functools": "partial",
        "pathlib": "Path PosixPath PurePath PurePosixPath WindowsPath",
        "types": "SimpleNamespace",
        "typing": "Any",
        "uuid": "UUID",
        "_codecs": "encode",
    }.items()
    for name in names.split()
)
_LIBRARY = sys.stdlib_module_names | {"__builtin__", "copy_reg", "nt"}


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a `.pth`, `.pt`, `.ckpt` (zip or legacy format) or `.safetensors` file, by name.

    The format is told by content, not by the suffix. Nested mappings and lists are flattened with dots ("ema.blocks.0.weight");
    where the top level holds a mapping `state_dict` (Lightning), that alone is returned, without prefix. What is not a tensor
    is dropped. Arrays are read-only views in the stored dtype (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        UserError: the file is missing, truncated, damaged, of another kind, holds no tensor, or its pickle asks for code.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; expected a .pth, .pt, .ckpt or .safetensors file")
    with file.open("rb") as f:
        head = f.read(9)
        f.seek(0)
        read = _reader(head)
        if read is None:
            raise UserError(f"{path}: not a PyTorch or safetensors file (its first bytes are {head[:8]!r}); download it again")
        try:
            tensors = read(f)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a damaged file can make the parsers raise anything
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: truncated or damaged ({type(error).__name__}: {reason}); download it again") from error
    if not tensors:
        raise UserError(f"{path}: holds no tensors; expected the weights of a network")
    return tensors


def _reader(head: bytes) -> Callable[[io.BufferedIOBase], dict[str, np.ndarray]] | None:
    if head[8:9] == b"{":  # first: its first eight bytes are a length, which may begin like either of the others
        return _read_safetensors
    if head.startswith(b"PK"):
        return _read_zip
    if head.startswith(b"\x80"):
        return _read_legacy
    return None


def _read_safetensors(f: io.BufferedIOBase) -> dict[str, np.ndarray]:
    entries = safetensors.deserialize(f.read())
    return {name: np.frombuffer(e["data"], _dtype(_SAFETENSORS[e["dtype"]])).reshape(e["shape"]) for name, e in entries}


def _read_zip(f: io.BufferedIOBase) -> dict[str, np.ndarray]:
    """torch >= 1.6: `NAME/data.pkl` and one stored record `NAME/data/KEY` per storage."""
    with zipfile.ZipFile(f) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("a zip archive, but not one of torch.save (no data.pkl inside)")
        root = pickles[0].removesuffix("data.pkl")
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise UserError("saved on a big-endian machine, which is not supported")
        tree = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        storages: dict[str, bytes] = {}

        def storage(key: str) -> bytes:
            if key not in storages:
                storages[key] = archive.read(f"{root}data/{key}")  # checks the CRC
            return storages[key]

        return {name: tensor.view(storage(tensor.storage.key)) for name, tensor in _weights(tree)}


def _read_legacy(f: io.BufferedIOBase) -> dict[str, np.ndarray]:
    """torch < 1.6: pickles of magic, protocol, system, tree, storage keys; then per key an int64 count and the raw values."""
    if _Unpickler(f).load() != _LEGACY_MAGIC:
        raise UserError("a pickle, but not one of torch.save; expected a PyTorch weights file")
    _Unpickler(f).load()  # protocol version
    if not _Unpickler(f).load()["little_endian"]:
        raise UserError("saved on a big-endian machine, which is not supported")
    unpickler = _Unpickler(f)
    tree = unpickler.load()
    storages = {}
    for key in _Unpickler(f).load():
        (count,) = struct.unpack("<q", f.read(8))
        size = count * _dtype(unpickler.storages[key].dtype).itemsize
        storages[key] = f.read(size)
        if size < 0 or len(storages[key]) != size:
            raise EOFError(f"storage {key} ends early")
    return {name: tensor.view(storages[tensor.storage.key]) for name, tensor in _weights(tree)}


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """A run of values in the file."""

    dtype: str
    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    """A strided view of a storage, in elements; the values are looked up after unpickling."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, raw: bytes) -> np.ndarray:
        dtype = _dtype(self.dtype)
        flat = np.frombuffer(raw, dtype)
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor with an impossible shape")
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, dtype)
        if last >= flat.size:
            raise ValueError("a tensor reaches outside its storage")
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


class _Inert:
    """Stands for an object of an unknown class: takes any arguments, state and items, and does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _swallow(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = _swallow


class _Function:
    """A constructor that a pickle may call, and only call (BUILD on it fails)."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    _requires_grad, _hooks, dtype = rest[:3]
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


_GLOBALS |= {
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Function(lambda data, *rest: data),
    "torch._utils._rebuild_parameter_with_state": _Function(lambda data, *rest: data),
    "torch._tensor._rebuild_from_type_v2": _Function(lambda build, kind, args, state: build(*args)),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, f: io.BufferedIOBase):
        super().__init__(f, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _GLOBALS:
            return _GLOBALS[full]
        if full not in _HARMLESS and module.split(".")[0] in _LIBRARY:
            raise UserError(f"refused: its pickle names {full}, which no weights need; do not open this file with torch")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _location, _count, *view = pid
        if kind != "storage" or not isinstance(dtype, str) or any(part is not None for part in view):
            raise pickle.UnpicklingError("an unknown kind of storage")
        return self.storages.setdefault(str(key), _Storage(dtype, str(key)))


def _weights(tree: Any) -> Iterator[tuple[str, _Tensor]]:
    """(dotted name, tensor) for every tensor in the tree, or in its `state_dict` where it has one."""
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    queue, visited = collections.deque([("", tree)]), 0
    while queue:
        name, node = queue.popleft()
        visited += 1
        if visited > _MAX_NODES:
            raise UserError("its objects contain themselves, or are too many; expected the weights of a network")
        if isinstance(node, _Tensor):
            yield name, node
        elif isinstance(node, dict | list | tuple):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            queue.extend((f"{name}.{key}" if name else str(key), child) for key, child in items)
