"""The reader of torch and safetensors files: every format, and nothing that a file pickles is ever executed.

The torch files are written here, byte by byte, so that the suite needs no torch.
"""

import collections
import io
import json
import os
import pickle
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_jax.checkpoints.torch_file import read_tensors
from dip_jax.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
CLASS_OF = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class Global:
    """Pickles as a bare reference to module.name, whether or not that exists."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as module.name(*args), with an optional state."""

    def __init__(self, module, name, *args, state=None):
        self.function, self.args, self.state = Global(module, name), args, state


class Tensor:
    """A strided view of a flat array, pickled as torch does."""

    def __init__(self, flat, key, shape, strides, offset=0, v3=False):
        self.flat, self.key, self.view, self.v3 = flat, key, (offset, tuple(shape), tuple(strides)), v3


class Pickler(pickle._Pickler):
    """The Python pickler, with globals that need not exist, and storages as persistent ids."""

    def __init__(self, file, *, legacy):
        super().__init__(file, protocol=2)
        self.legacy, self.storages = legacy, {}

    def persistent_id(self, obj):
        if isinstance(obj, tuple) and obj[:1] == ("storage!",):
            pid = ("storage", obj[1], obj[2], "cpu", obj[3])
            return (*pid, None) if self.legacy else pid
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            return self.write(f"c{obj.module}\n{obj.name}\n".encode())
        if isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
            return None
        if isinstance(obj, State):
            self.save(obj.function)
            self.save(obj.state)
            return self.write(pickle.BUILD)
        if isinstance(obj, Tensor):
            self.storages[obj.key] = obj.flat
            name = "UntypedStorage" if obj.v3 else CLASS_OF[obj.flat.dtype.name]
            storage = ("storage!", Global("torch.storage" if obj.v3 else "torch", name), obj.key, obj.flat.size)
            rest = (False, collections.OrderedDict())
            if obj.v3:
                call = Call(
                    "torch._utils", "_rebuild_tensor_v3", storage, *obj.view, *rest, Global("torch", obj.flat.dtype.name)
                )
            else:
                call = Call("torch._utils", "_rebuild_tensor_v2", storage, *obj.view, *rest)
            return self.save(call)
        return super().save(obj, save_persistent_id)


def write_zip(tree, *, flip_key=None):
    body = io.BytesIO()
    pickler = Pickler(body, legacy=False)
    pickler.dump(tree)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", body.getvalue())
        archive.writestr("model/byteorder", "little")
        for key, flat in pickler.storages.items():
            archive.writestr(f"model/data/{key}", flat.tobytes())
        archive.writestr("model/version", "3\n")
    return out.getvalue()


def write_legacy(tree):
    out = io.BytesIO()
    for part in (LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(part, out, protocol=2)
    pickler = Pickler(out, legacy=True)
    pickler.dump(tree)
    pickle.dump(sorted(pickler.storages), out, protocol=2)
    for key in sorted(pickler.storages):
        flat = pickler.storages[key]
        out.write(struct.pack("<q", flat.size) + flat.tobytes())
    return out.getvalue()


WRITERS = {"zip": write_zip, "legacy": write_legacy}


def contiguous(array, key, **kwargs):
    strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    return Tensor(array.reshape(-1), key, array.shape, strides, **kwargs)


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    def write_and_path(tree):
        path = tmp_path / "weights.pth"
        path.write_bytes(WRITERS[request.param](tree))
        return path

    return write_and_path


@pytest.mark.parametrize("dtype", CLASS_OF)
def test_values_come_back_in_their_dtype(write, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(getattr(ml_dtypes, dtype, dtype))
    got = read_tensors(write({"w": contiguous(array, "0")}))
    assert got["w"].dtype == array.dtype
    np.testing.assert_array_equal(got["w"], array)


def test_views_share_a_storage_and_may_be_transposed(write):
    flat = np.arange(12, dtype=np.float32)
    got = read_tensors(write({"a": Tensor(flat, "0", (3, 2), (1, 3), offset=2), "b": Tensor(flat, "0", (), (), offset=7)}))
    np.testing.assert_array_equal(got["a"], np.array([[2, 5], [3, 6], [4, 7]], np.float32))
    assert got["b"] == 7
    assert not got["a"].flags.writeable


def test_third_generation_tensors_and_parameters(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    parameter = Call("torch._utils", "_rebuild_parameter", contiguous(array, "1"), True, collections.OrderedDict())
    path = tmp_path / "w.pt"
    path.write_bytes(write_zip({"v3": contiguous(array.astype(ml_dtypes.bfloat16), "0", v3=True), "parameter": parameter}))
    got = read_tensors(path)
    assert got["v3"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got["v3"].astype(np.float32), array)
    np.testing.assert_array_equal(got["parameter"], array)


def test_nested_mappings_are_flattened_and_other_things_dropped(write):
    array = np.ones((2,), np.float32)
    tree = {"ema": {"w": contiguous(array, "0")}, "list": [3, contiguous(array, "1")], "epoch": 7, "name": "x"}
    assert set(read_tensors(write(tree))) == {"ema.w", "list.1"}


def test_lightning_checkpoint_gives_its_state_dict_and_ignores_foreign_objects(write):
    array = np.ones((2,), np.float32)
    hyper = Call("omegaconf.dictconfig", "DictConfig", {"lr": 1e-4}, state={"content": [1, 2], "type": Global("typing", "Any")})
    values = Call("numpy._core.multiarray", "_reconstruct", Global("numpy", "ndarray"), (0,), b"b", state=(1, (3,), None, b"x"))
    network = Call("torch.nn.modules.linear", "Linear", state={"_parameters": {"weight": contiguous(array, "2")}})
    tree = {
        "state_dict": collections.OrderedDict(w=contiguous(array, "0")),
        "optimizer_states": [{"state": {0: {"exp_avg": contiguous(array, "1")}}}],
        "hyper_parameters": hyper,
        "random": {"state": values, "device": Call("torch", "device", "cpu"), "dtype": Global("torch", "bfloat16")},
        "network": network,
        "callbacks": {
            "best": Call("pathlib", "PosixPath", "a"),
            "every": Call("datetime", "timedelta", 0, 30, 0),
            "scores": Call("collections", "defaultdict", Global("torch.optim.adamw", "AdamW")),
            "kind": Global("lightning.pytorch.callbacks", "ModelCheckpoint"),
        },
    }
    before = set(sys.modules)
    assert set(read_tensors(write(tree))) == {"w"}
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & {"omegaconf", "lightning", "torch", "argparse"}


@pytest.mark.parametrize(
    "module, name",
    [("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"), ("__builtin__", "exec"), ("sys", "exit")]
    + [("subprocess", "Popen"), ("builtins", "getattr"), ("importlib", "import_module"), ("operator", "attrgetter")],
)
def test_a_pickle_that_asks_for_code_is_refused_unexecuted(write, tmp_path, module, name):
    mark = tmp_path / "executed"
    path = write({"w": contiguous(np.ones((2,), np.float32), "0"), "evil": Call(module, name, f"touch {mark}")})
    with pytest.raises(UserError, match=f"refused: its pickle names {module}.{name}") as error:
        read_tensors(path)
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_code_of_an_unknown_package_is_never_imported(write, tmp_path, monkeypatch):
    (tmp_path / "evil_package.py").write_text("open('executed', 'w').close()\ndef run(*a): open('executed', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    got = read_tensors(write({"w": contiguous(np.ones((2,), np.float32), "0"), "evil": Call("evil_package", "run", 1)}))
    assert set(got) == {"w"}
    assert not os.path.exists("executed")


class State:
    """Pickles as an existing global with a state set on it (BUILD)."""

    def __init__(self, function, state):
        self.function, self.state = function, state


def test_constructors_cannot_be_tampered_with(write):
    poison = State(Global("torch._utils", "_rebuild_tensor_v2"), (None, {"__defaults__": (1,)}))
    with pytest.raises(UserError, match="a state for a function"):
        read_tensors(write({"evil": poison, "w": contiguous(np.ones((2,), np.float32), "0")}))


@pytest.mark.parametrize(
    "shape, strides, offset",
    [
        ((5,), (1,), 0),
        ((2,), (1,), 3),
        ((2, 2), (3, 1), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 2),
        ((2,), (1,), -1),
        ((2, 2), (1,), 0),
    ],
)
def test_a_tensor_cannot_reach_outside_its_storage(write, shape, strides, offset):
    with pytest.raises(UserError, match="truncated or damaged"):
        read_tensors(write({"w": Tensor(np.ones((4,), np.float32), "0", shape, strides, offset)}))


def test_a_tree_that_contains_itself_ends(write, monkeypatch):
    monkeypatch.setattr("dip_jax.checkpoints.torch_file._MAX_NODES", 1000)
    loop = {}
    loop["again"] = loop
    with pytest.raises(UserError, match="contain themselves"):
        read_tensors(write(loop))


def test_truncation_anywhere_is_one_line(write):
    path = write({"w": contiguous(np.arange(64, dtype=np.float32), "0"), "v": contiguous(np.arange(8), "1")})
    whole = path.read_bytes()
    for size in (0, 1, 5, 9, *range(16, len(whole), 61), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            read_tensors(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_flipped_bit_in_a_zip_record_is_found(tmp_path):
    whole = bytearray(write_zip({"w": contiguous(np.arange(64, dtype=np.float32), "0")}))
    at = whole.index(np.arange(64, dtype=np.float32).tobytes()) + 17
    whole[at] ^= 4
    (tmp_path / "w.pt").write_bytes(whole)
    with pytest.raises(UserError, match="CRC"):
        read_tensors(tmp_path / "w.pt")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(WRITERS)))
def test_random_damage_gives_tensors_or_one_line(tmp_path_factory, data, kind):
    whole = bytearray(WRITERS[kind]({"w": contiguous(np.arange(16, dtype=np.float32), "0"), "x": Call("a.b", "c", 1)}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    path.write_bytes(whole)
    try:
        assert all(isinstance(value, np.ndarray) for value in read_tensors(path).values())
    except UserError as error:
        assert "\n" not in str(error)


def write_safetensors(path, arrays):
    """A header length, a JSON header, the values."""
    names, header, body = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}, {}, b""
    for key, value in arrays.items():
        header[key] = {
            "dtype": names[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [len(body), len(body) + value.nbytes],
        }
        body += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_safetensors(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2,), ml_dtypes.bfloat16), "c": np.array(4)}
    write_safetensors(tmp_path / "w.safetensors", arrays)
    got = read_tensors(tmp_path / "w.safetensors")
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("length", [0x480, 0x4B50])
def test_a_safetensors_header_may_be_as_long_as_another_formats_first_bytes(tmp_path, length):
    """Its file begins with this number, little end first: 80 as a pickle does, 50 4B as a zip."""
    arrays, path = {"a": np.arange(6, dtype=np.float32)}, tmp_path / "w.safetensors"
    write_safetensors(path, arrays)
    written = path.read_bytes()
    size = int.from_bytes(written[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + written[8 : 8 + size].ljust(length) + written[8 + size :])
    np.testing.assert_array_equal(read_tensors(path)["a"], arrays["a"])


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1"])
def test_other_files_are_named_as_such(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="not a PyTorch or safetensors file"):
        read_tensors(tmp_path / "w.pth")


def test_missing_file_and_foreign_pickle_and_zip(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"w": [1.0]}, protocol=2))
    with pytest.raises(UserError, match="not one of torch"):
        read_tensors(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="not one of torch"):
        read_tensors(tmp_path / "w.pth")


def test_a_file_without_tensors(write):
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(write({"epoch": 3}))
