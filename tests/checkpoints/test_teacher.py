"""The user's file of the teacher: what is missing or wrong is one line that says what to get."""

import os
import pickle

import numpy as np
import pytest
from dinov2_cases import random_tensors
from safetensors.numpy import save_file

from dip_jax.checkpoints.teacher import PUBLISHED, load_teacher
from dip_jax.errors import UserError
from dip_jax.models.dinov2 import DinoV2, tensor_shapes

SMALL = DinoV2(width=64, depth=2, table_side=3)


def test_a_file_gives_sizes_and_parameters(tmp_path):
    tensors = random_tensors(SMALL)
    save_file(tensors, tmp_path / "dinov2.safetensors")
    encoder, params = load_teacher(tmp_path / "dinov2.safetensors")
    assert encoder == SMALL
    np.testing.assert_array_equal(params["blocks"]["down"]["kernel"][1], tensors["blocks.1.mlp.fc2.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["qkv"]["kernel"][0, :, 2], tensors["blocks.0.attn.qkv.weight"][128:].T)


def test_a_missing_file_is_told_with_its_source_size_and_hash(tmp_path):
    with pytest.raises(UserError) as error:
        load_teacher(tmp_path / "none.pth")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'none.pth'}: no such file") and "\n" not in message
    size, digest = PUBLISHED["dinov2_vitb14_pretrain.pth"]
    assert f"{size} bytes" in message and digest in message and "https://dl.fbaipublicfiles.com/dinov2/" in message


@pytest.mark.parametrize(("name", "width", "depth"), [("vits14", 384, 12), ("vitb14", 768, 12), ("vitl14", 1024, 24)])
def test_published_sizes_are_those_of_float32_tensors(name, width, depth):
    size, digest = PUBLISHED[f"dinov2_{name}_pretrain.pth"]
    values = sum(int(np.prod(shape)) for shape in tensor_shapes(DinoV2(width, depth)).values())
    assert 0 < size - 4 * values < 120_000  # the names, and a header per tensor
    assert len(bytes.fromhex(digest)) == 32


def test_another_network_is_named_with_its_file(tmp_path):
    save_file({"conv.weight": np.zeros((3, 3), np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"^\S+other.safetensors: no DINOv2 as the hub has it: .*conv.weight"):
        load_teacher(tmp_path / "other.safetensors")


def test_a_file_that_asks_for_code_is_refused_unexecuted(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UserError, match=r"evil.pth: refused: its pickle names .*mkdir"):
        load_teacher(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()
