"""Outputs are what their names say."""

import os

import pytest

from dip_jax.errors import UserError
from dip_jax.runtime import storage

SUFFIXES = {
    "a.PNG": ".png",
    "a.npz": ".npz",
    "gs://b/a.JPeG": ".jpeg",
    "a.tar.gz": ".gz",
    "x.safetensors": ".safetensors",
    "a.pt": ".pt",
}
NONE = ["runs/a", "a/", "guidance_4.0", "a.png/", "npz", "v1.2", "a.npzs", ""]


@pytest.mark.parametrize("name", SUFFIXES)
def test_a_suffix_makes_a_file(name):
    assert storage.suffix_of(name) == SUFFIXES[name]
    with pytest.raises(UserError, match="is to be a directory: name it without"):
        storage.require_folder_name(name, flag="--out")


@pytest.mark.parametrize("name", NONE)
def test_without_one_it_is_a_directory(name, tmp_path):
    assert storage.suffix_of(name) == ""
    storage.require_folder_name(f"{tmp_path}/{name}", flag="--out")
    with pytest.raises(UserError, match=r"must end in \.png"):
        storage.require_file_name(name, flag="--out", suffix=".png")


def test_what_exists_as_another_kind_of_thing_is_refused(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b").write_text("")
    with pytest.raises(UserError, match="is a directory where a file is to be written"):
        storage.require_file_name(tmp_path / "a.png", flag="--out", suffix=".png")
    with pytest.raises(UserError, match="is a file where a directory is to be made"):
        storage.require_folder_name(tmp_path / "b", flag="--out")
    storage.require_folder_name(tmp_path / "c", flag="--out")
    storage.require_file_name(tmp_path / "c.png", flag="--out", suffix=".png")


@pytest.mark.parametrize(
    "home, found", [("/elsewhere", "/elsewhere/dip_jax"), ("", "~/.cache/dip_jax"), ("rel", "~/.cache/dip_jax")]
)
def test_the_users_cache_lies_in_no_relative_folder(home, found, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert storage.cache_folder() == os.path.expanduser(found)
