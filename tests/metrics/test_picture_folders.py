"""Folders of pictures as sets of images: order, labels, what is left out, and one clear line for what does not fit."""

import io
import os

import numpy as np
import pytest
from pictures import encoded
from PIL import Image

from dip_jax.errors import UserError
from dip_jax.metrics import picture_folders
from dip_jax.sampling import sample_files

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)


def fill(folder, form="PNG", names="{:03d}.png", **options):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(PIXELS):
        (folder / names.format(i)).write_bytes(encoded(Image.fromarray(image), form, **options))
    return folder


@pytest.mark.parametrize("size", [1, 3, 50])
def test_batches_are_the_pictures_in_the_order_of_their_names(tmp_path, size):
    images = picture_folders.from_folder(fill(tmp_path))
    assert (images.count, images.image_shape, images.labels, images.notes) == (7, (4, 6, 3), None, ())
    batches = list(images.batches(size))
    assert all(len(batch) == size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), PIXELS)


def test_what_sample_writes_has_its_labels(tmp_path):
    labels = np.array([0, 207, 3, 0, 207, 3, 12345])
    output = sample_files.PictureFolder(tmp_path / "samples", labels=labels, batch_size=7)
    output.open({"seed": 0})
    output.write(0, PIXELS)
    images = picture_folders.from_folder(tmp_path / "samples")
    np.testing.assert_array_equal(images.labels, labels)
    np.testing.assert_array_equal(np.concatenate(list(images.batches(7))), PIXELS)
    assert images.notes == ()  # settings.json is ours


def test_other_pixels_have_another_fingerprint_and_a_touched_file_has_not(tmp_path):
    first = picture_folders.from_folder(fill(tmp_path)).fingerprint
    os.utime(tmp_path / "003.png", (1, 1))
    assert picture_folders.from_folder(tmp_path).fingerprint == first
    (tmp_path / "003.png").write_bytes((tmp_path / "002.png").read_bytes())
    assert picture_folders.from_folder(tmp_path).fingerprint != first


LOSSY = {
    "JPEG": ("{:03d}.png", {}, True),
    "WEBP": ("{:03d}.webp", {}, True),
    "lossless": ("{:03d}.WEBP", {"lossless": True}, False),
}


@pytest.mark.parametrize("form", LOSSY)
def test_loss_is_told_by_the_content_not_by_the_name(tmp_path, form):
    names, options, lossy = LOSSY[form]
    images = picture_folders.from_folder(fill(tmp_path, form if form == "JPEG" else "WEBP", names, **options))
    assert [("7 images were compressed with loss (000." in note) for note in images.notes] == [True] * lossy


def test_what_is_no_picture_is_left_out_and_said(tmp_path):
    fill(tmp_path)
    for name in ("notes.txt", ".DS_Store", ".000.png.partial"):
        (tmp_path / name).write_text("")
    (tmp_path / "grids").mkdir()
    images = picture_folders.from_folder(tmp_path)
    assert images.count == 7
    assert [note.removeprefix(f"{tmp_path}: ") for note in images.notes] == [
        "1 files are no images by their names and were left out (notes.txt).",
        "1 folders inside were left out (grids).",
    ]


def buffer_of(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


FAULTS = {
    "another size": (lambda folder: (folder / "005.png").write_bytes(buffer_of(PIXELS[0, :2])), "000.png is 6x4, 005.png 6x2"),
    "no image": (lambda folder: (folder / "005.png").write_text("hello"), "005.png is no image that Pillow reads"),
    "empty file": (lambda folder: (folder / "005.png").write_text(""), "005.png is no image that Pillow reads"),
    "cut": (lambda folder: (folder / "005.png").write_bytes((folder / "005.png").read_bytes()[:60]), "005.png: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_named(tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(fill(tmp_path))
    with pytest.raises(UserError) as error:
        list(picture_folders.from_folder(tmp_path).batches(3))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(UserError, match="holds nothing, expected images"):
        picture_folders.from_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"holds 1 files such as notes\.txt, expected images"):
        picture_folders.from_folder(tmp_path)
    fill(tmp_path / "cats")
    with pytest.raises(UserError, match=r"holds no image itself but 1 folders \(cats, ...\).*--out=ANOTHER_DIR"):
        picture_folders.from_folder(tmp_path)
