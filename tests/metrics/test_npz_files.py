"""Images and statistics in .npz files: read as a stream, never unpickled, and one clear line for everything malformed."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from dip_jax.errors import UserError
from dip_jax.metrics import npz_files

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
STATISTICS = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_batches_are_the_images_in_order(tmp_path, writer, size):
    writer(tmp_path / "a.npz", arr_0=PIXELS, arr_1=np.arange(7))
    images = npz_files.from_npz(tmp_path / "a.npz")
    assert (images.count, images.image_shape) == (7, (4, 5, 3))
    np.testing.assert_array_equal(images.labels, np.arange(7))
    batches = list(images.batches(size))
    assert all(len(batch) == size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), PIXELS)
    np.testing.assert_array_equal(np.concatenate(list(images.batches(size))), PIXELS)  # a second time


def test_files_of_other_pixels_have_other_fingerprints(tmp_path):
    other = PIXELS.copy()
    other[0, 0, 0, 0] ^= 1
    a, b = save(tmp_path / "a.npz", arr_0=PIXELS), save(tmp_path / "b.npz", arr_0=other)
    assert npz_files.from_npz(a).fingerprint != npz_files.from_npz(b).fingerprint


class Executed:
    def __reduce__(self):
        return (open, ("executed", "w"))


def objects(path):
    """An arr_0 of dtype object whose pickle would make a file."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    member.write(pickle.dumps([Executed()], protocol=2))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", member.getvalue())


def npy(array):
    member = io.BytesIO()
    np.save(member, array)
    return member.getvalue()


MALFORMED = {
    "pickled": (objects, "pickled Python objects, which are never loaded"),
    "floats": (
        lambda path: save(path, arr_0=np.zeros((2, 4, 4, 3), np.float32)),
        "holds float32 .* from 0 to 0, expected",
    ),
    "not a number": (lambda path: save(path, arr_0=np.full((2, 4, 4, 3), np.nan, np.float32)), "from nan to nan, .* no rule"),
    "int64": (lambda path: save(path, arr_0=np.zeros((2, 4, 4, 3), np.int64)), "arr_0 holds int64 .*, expected uint8"),
    "complex": (
        lambda path: save(path, arr_0=np.zeros((2, 4, 4, 3), np.complex64)),
        "holds complex64 .*, expected",
    ),
    "empty": (lambda path: save(path, arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "and at least one image"),
    "channels first": (lambda path: save(path, arr_0=np.zeros((2, 3, 4, 4), np.uint8)), r"save arr_0.transpose\(0, 2, 3, 1\)$"),
    "fortran": (lambda path: save(path, arr_0=np.asfortranarray(PIXELS)), r"Fortran order: save np.ascontiguousarray\(arr_0\)"),
    "other name": (lambda path: save(path, images=PIXELS), r"holds images; .* arr_0: save them with np.savez\(FILE, images\)"),
    "other names": (lambda path: save(path, x=PIXELS, y=PIXELS), "holds x, y; expected images under the name arr_0$"),
    "one array": (lambda path: path.write_bytes(npy(PIXELS)), r"a single array .* np.savez\(FILE, np.load\("),
    "labels missing": (lambda path: save(path, arr_0=PIXELS, arr_1=np.arange(6)), "arr_1 holds int64 \\[6\\], expected 7"),
    "float labels": (lambda path: save(path, arr_0=PIXELS, arr_1=np.zeros(7)), "arr_1 holds float64 \\[7\\], expected 7"),
    "object labels": (lambda path: save(path, arr_0=PIXELS, arr_1=np.array([None] * 7)), "arr_1 cannot be read"),
    "no zip": (lambda path: path.write_bytes(b"PNG..."), "not an .npz file, or a damaged one"),
    "no npy": (lambda path: zipfile.ZipFile(path, "w").writestr("arr_0.npy", b"hello"), "not an array written by numpy"),
    "missing": (lambda path: None, "no such file"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_one_clear_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, message = MALFORMED[case]
    make(tmp_path / "a.npz")
    with pytest.raises(UserError, match=message) as error:
        npz_files.from_npz(tmp_path / "a.npz")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_cut_or_changed_file_is_found(tmp_path):
    path = save(tmp_path / "a.npz", arr_0=PIXELS)
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged"):
            npz_files.from_npz(path)
    at = whole.index(PIXELS.tobytes()) + 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="damaged"):
        list(npz_files.from_npz(path).batches(3))


def test_a_header_that_announces_more_pixels_than_there_are(tmp_path):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 256, 256, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", member.getvalue())
    with pytest.raises(UserError, match="does not hold the"):
        npz_files.from_npz(tmp_path / "a.npz")


def test_references_of_images_statistics_and_both(tmp_path):
    images = npz_files.read_reference(save(tmp_path / "a.npz", arr_0=PIXELS))
    assert images.images.count == 7 and images.pool is None
    statistics = npz_files.read_reference(save(tmp_path / "b.npz", **STATISTICS))
    assert statistics.images is None and statistics.pool.mean.shape == (4,) and statistics.spatial.covariance.shape == (3, 3)
    both = npz_files.read_reference(save(tmp_path / "c.npz", arr_0=PIXELS, **STATISTICS))
    assert both.images.count == 7 and both.pool.count is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sigma": None}, "has mu, mu_s, sigma_s but not sigma"),
        ({"mu_s": None, "sigma_s": None}, "but not mu_s, sigma_s"),
        ({"sigma": np.eye(3)}, "are not a finite mean"),
        ({"mu": np.full(4, np.nan)}, "are not a finite mean"),
        ({"mu": np.zeros(4, np.int32)}, "are not a finite mean"),
        (dict.fromkeys(STATISTICS) | {"other": np.zeros(1)}, "holds other; expected images"),
    ],
)
def test_references_with_missing_or_misfitting_keys(tmp_path, change, message):
    arrays = {name: value for name, value in (STATISTICS | change).items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        npz_files.read_reference(save(tmp_path / "a.npz", **arrays))
    assert "\n" not in str(error.value)
