"""The embedded photographs: ten classes, balanced, the same on every machine, never the same crop twice."""

import numpy as np
import pytest
from PIL import Image

from dip_jax.data import photo_crops


@pytest.fixture(scope="module")
def cropper():
    return photo_crops.Cropper(64)


def test_the_ten_photographs_are_installed():
    sizes = {name: photo_crops.load_photograph(name).size for name in photo_crops.PHOTOGRAPHS}
    assert len(sizes) == 10
    assert sizes["chelsea"] == (451, 300) and sizes["retina"] == (1411, 1411) and sizes["china"] == (640, 427)


def test_a_crop_is_a_function_of_seed_and_number(cropper):
    again = photo_crops.Cropper(64)
    crops = {}
    for seed in (0, 1):
        for i in range(20):
            crop = np.asarray(cropper.crop(seed, i))
            assert crop.shape == (64, 64, 3) and crop.dtype == np.uint8
            np.testing.assert_array_equal(crop, np.asarray(again.crop(seed, i)))
            crops[seed, i] = crop.tobytes()
    assert len(set(crops.values())) == 40


def test_a_crop_is_the_window_that_its_numbers_say(cropper):
    """Against one resize of the photograph itself, without the halved copies."""
    smallest = photo_crops.SMALLEST_SIDE
    for i in range(30):
        photograph = photo_crops.load_photograph(list(photo_crops.PHOTOGRAPHS)[i % 10])
        scale, x, y = np.random.Generator(np.random.PCG64([0, i])).random(3)
        side = min(photograph.size) * (smallest + (1 - smallest) * scale)
        left, top = x * (photograph.width - side), y * (photograph.height - side)
        box = (left, top, left + side, top + side)
        expected = photograph.resize((64, 64), Image.Resampling.BICUBIC, box=box)
        error = np.abs(np.asarray(expected, float) - np.asarray(cropper.crop(0, i)))
        assert error.mean() < 2.5, (i, error.mean())


def test_the_builder_writes_array_record_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_crops, "SPLITS", {"train": (0, 30), "validation": (1, 20)})
    builder = photo_crops.PhotoCrops(config=photo_crops.CropsConfig(32), data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source("train")
    assert len(source) == 30 and len(builder.as_data_source("validation")) == 20
    labels = [int(source[i]["label"]) for i in range(30)]
    assert np.bincount(labels).tolist() == [3] * 10
    assert source[0]["image"].shape == (32, 32, 3)
    assert list(tmp_path.rglob("*.array_record*")) and not list(tmp_path.rglob("*.tfrecord*"))


def test_large_crops_are_fewer_so_that_tfds_shuffles_them_in_memory():
    counts = {size: photo_crops.count_crops("train", image_size=size) for size in (16, 64, 128, 160, 256, 512, 4096)}
    assert counts[16] == counts[64] == counts[128] == 20_000 and counts[256] == 5_000 and counts[4096] == 20
    assert all(count % 10 == 0 and count * 3 * size**2 < 2**30 for size, count in counts.items() if count > 20)
    assert photo_crops.count_crops("validation", image_size=256) == 500
