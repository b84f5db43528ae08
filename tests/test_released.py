"""The model that ships in `released/`: the bytes are those that were trained, it is small, it draws its ten photographs."""

import hashlib
import re

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from places import ROOT

import dip_jax
from dip_jax import __main__
from dip_jax.checkpoints import checkpoint, manifest
from dip_jax.data.photo_crops import Cropper

RELEASED = ROOT / "released"
SHA256 = "abce7db2ce4d7b81ddc6f29095cc0869f339766abbc67a1f146f97d9e040e303"  # of the manifest, which has that of every file


def test_it_is_what_was_trained():
    assert hashlib.sha256((RELEASED / manifest.SHA256).read_bytes()).hexdigest() == SHA256
    assert manifest.damage(epath.Path(RELEASED)) is None


def test_it_is_small():
    assert sum(file.stat().st_size for file in RELEASED.rglob("*") if file.is_file()) <= 10_000_000


def test_its_card_is_complete_and_says_what_the_checkpoint_says():
    card = (RELEASED / "README.md").read_text()
    assert "TODO" not in card
    record = checkpoint.read_record(epath.Path(RELEASED))
    assert all(re.search(rf"^{i}\. {name}$", card, flags=re.MULTILINE) for i, name in enumerate(record.classes))
    drawing = record.config.sample
    assert f"steps={drawing.steps}, guidance={drawing.guidance}, interval={drawing.interval}, t_shift={drawing.t_shift}" in card
    assert f"then {record.config.train.steps:,} with the head" in card
    _, params = dip_jax.load(RELEASED)
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}" in card
    for picture in re.findall(r"!\[[^]]*\]\((.*?)\)", card):
        assert (RELEASED / picture).exists()


def test_the_readme_draws_from_it(tmp_path, monkeypatch):
    (line,) = re.findall(
        r"^python -m dip_jax (sample --checkpoint=released .*?) +#", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    (tmp_path / "released").symlink_to(RELEASED)
    monkeypatch.chdir(tmp_path)
    assert __main__.main([*line.split(), "--steps=2", "--num_samples=10"]) == 0
    with Image.open("samples.png") as picture:
        assert picture.size[1] > 10 * 64


@pytest.mark.slow
def test_it_draws_its_ten_photographs():
    """Shrunk to 8x8, most samples lie nearest to the crops of their own class; chance would be one in ten."""
    model, params = dip_jax.load(RELEASED)
    side, classes = model.config.image_size[0], model.config.num_classes
    drawn = dip_jax.sample(model, params, labels=np.repeat(range(classes), 2), seed=0, steps=12, guidance=1.0)
    cropper = Cropper(side)
    crops = np.stack([np.asarray(cropper.crop(1, i)) for i in range(30 * classes)])
    distances = ((_shrink(drawn)[:, None] - _shrink(crops)[None]) ** 2).sum((2, 3, 4))
    nearest = distances.argmin(1) % classes  # crop i is of class i modulo their number
    assert (nearest == np.repeat(range(classes), 2)).mean() >= 0.8


def _shrink(images: np.ndarray) -> np.ndarray:
    n, h, w, c = images.shape
    return images.reshape(n, 8, h // 8, 8, w // 8, c).mean((2, 4)) / 255
