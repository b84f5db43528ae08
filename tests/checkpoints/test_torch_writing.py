"""Files written for torch: our reader gets the same bits back, and the pickle holds nothing but the few names that it needs."""

import io
import pickletools
import zipfile

import numpy as np

from dip_jax.checkpoints.torch_file import read_tensors
from dip_jax.checkpoints.torch_writing import torch_bytes

ARRAYS = {
    "matrix.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "scalar": np.float32(7) + np.zeros((), np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "bits": np.array([0x7FC00001, 0x80000000, 1], np.uint32).view(np.float32),
    "größe": np.ones((1,), np.float32),
}


def test_values_come_back_bit_by_bit_in_their_order(tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(torch_bytes(ARRAYS.items()))
    back = read_tensors(file)
    assert list(back) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (back[name].dtype, back[name].shape) == (np.float32, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_the_pickle_is_well_formed_and_asks_for_tensors_alone():
    with zipfile.ZipFile(io.BytesIO(torch_bytes(ARRAYS.items()))) as archive:
        assert {"archive/version", "archive/byteorder", "archive/data.pkl"} <= set(archive.namelist())
        assert {(info.compress_type, info.date_time[0]) for info in archive.infolist()} == {(zipfile.ZIP_STORED, 1980)}
        pickled = archive.read("archive/data.pkl")
    pickletools.dis(pickled, io.StringIO())  # raises where the stack does not work out
    names = {argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    assert names == {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    assert max(code.proto for code, *_ in pickletools.genops(pickled)) == 2
