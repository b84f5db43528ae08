"""What the judge relies on without looking, for every row of `NETWORKS`."""

import json
import re

import jax
import numpy as np
import pytest
import random_inception
import safetensors.numpy
from places import GOLDEN

from dip_jax.errors import UserError
from dip_jax.metrics import features, image_sets
from dip_jax.metrics.judge import Judge

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
LARGE = ("inception",)  # whose numbers take their time


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Files for the networks that bring no weights of their own."""
    file = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    shapes = json.loads((GOLDEN / "inception.json").read_text())["shapes"]
    safetensors.numpy.save_file(random_inception.tensors(shapes), file)
    return {"inception": str(file)}


def opened(name: str, weights: dict[str, str]) -> features.Network:
    return features.open_network(name, weights.get(name, ""))


@pytest.mark.parametrize("name", features.NETWORKS)
def test_the_outputs_are_float32_rows_of_the_widths_that_it_states(name, weights):
    network = opened(name, weights)
    out = jax.eval_shape(network.apply, jax.ShapeDtypeStruct(IMAGES.shape, np.uint8))
    assert set(out) == {"logits", *network.dimensions} and "pool" in out
    for key, value in out.items():
        assert value.dtype == np.float32 and value.ndim == 2 and len(value) == len(IMAGES), key
        assert value.shape[1] == network.dimensions.get(key, value.shape[1]), key


@pytest.mark.parametrize("name", features.NETWORKS)
def test_its_name_is_in_every_metric_unless_published_numbers_are_its_own(name, weights):
    network = opened(name, weights)
    assert re.fullmatch(r"[0-9a-f]{64}", network.digest) and network.input(256, 256)
    assert network.suffix == ("" if name == "inception" else f"_{name}")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in features.NETWORKS])
def test_an_image_has_the_same_features_wherever_it_stands_and_a_judge_takes_them(name, weights):
    network = opened(name, weights)
    images = image_sets.from_array(IMAGES)
    forward, backward = (network.apply(jax.numpy.asarray(rows)) for rows in (IMAGES, IMAGES[::-1]))
    for key in forward:
        np.testing.assert_allclose(forward[key], backward[key][::-1], rtol=1e-4, atol=1e-4, err_msg=key)
        assert np.isfinite(forward[key]).all() and np.std(forward[key], axis=0).max() > 0, key
    metrics = Judge(network, images, batch_size=4)(images).metrics
    assert {f"{metric}{network.suffix}" for metric in ("fid", "is", "precision", "recall")} < set(metrics)
    assert abs(metrics[f"fid{network.suffix}"]) < 1e-3 and metrics[f"precision{network.suffix}"] == 1


def test_a_name_that_is_no_row_names_the_nearest():
    with pytest.raises(UserError, match="features='lite' is unknown: it is one of inception, lite0; did you mean 'lite0'"):
        features.open_network("lite")
