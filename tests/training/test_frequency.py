"""The frequency-weighted loss: its formula, the authors' own code, and the training step without it."""

import jax
import numpy as np
import options_cases as case
import pytest
from scipy import fft
from small_training import first_step

from dip_jax.config import Config, Flow, Model
from dip_jax.errors import UserError
from dip_jax.training import frequency

LUMINANCE_ROW = [16, 11, 10, 16, 24, 40, 51, 61]


def test_weights_are_those_of_jpeg_at_quality_85():
    weights = frequency.frequency_weights()
    np.testing.assert_allclose(weights.mean(axis=(1, 2)), 1, rtol=1e-12)
    steps = np.floor((np.array(LUMINANCE_ROW) * 30 + 50) / 100)
    np.testing.assert_allclose(weights[0, 0] / weights[0, 0, 0], steps[0] / steps, rtol=1e-12)
    np.testing.assert_array_equal(weights[1], weights[2])


def test_the_loss_is_its_formula_in_float64():
    said, target = case.velocities()
    error = said.astype(np.float64) - target
    y = error @ [0.299, 0.587, 0.114]
    channels = [y, error @ [-0.168736, -0.331264, 0.5], error @ [0.5, -0.418688, -0.081312]]
    total = 0.0
    for channel, weight in zip(channels, frequency.frequency_weights(), strict=True):
        blocks = channel.reshape(len(said), 2, 8, 3, 8).transpose(0, 1, 3, 2, 4)
        total += np.mean(weight * fft.dctn(blocks, axes=(-2, -1), norm="ortho") ** 2)
    assert float(jax.jit(frequency.frequency_loss)(said, target)) == pytest.approx(total / 3, rel=1e-6)


def test_the_loss_is_that_of_the_authors_code():
    """1e-5; recorded by benchmarks/options_golden.py."""
    answers = case.answers()
    np.testing.assert_allclose(frequency.frequency_weights(), answers["deco/weights"], rtol=1e-5)
    found = float(jax.jit(frequency.frequency_loss)(*case.velocities()))
    assert found == pytest.approx(float(answers["deco/loss"]), rel=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_the_step_adds_it_to_the_flow_loss(prediction):
    model = {"prediction": prediction}
    plain, with_it = first_step(model), first_step(model, flow=Flow(frequency_weight=0.5))
    assert set(plain) & {"loss_flow", "loss_frequency"} == set()
    assert with_it["loss_flow"] == plain["loss"] and with_it["loss_frequency"] > 0
    assert with_it["loss"] == pytest.approx(with_it["loss_flow"] + 0.5 * with_it["loss_frequency"], rel=1e-6)
    assert with_it["grad_norm"] != plain["grad_norm"]


def test_images_that_are_no_multiple_of_8_are_refused():
    model = Model(size="tiny", image_size=(12, 12), patch_size=4)
    with pytest.raises(UserError, match="blocks of 8x8 pixels"):
        Config(model=model, flow=Flow(frequency_weight=1.0))
    with pytest.raises(UserError, match=r"flow.frequency_weight=-1.0 must not be negative"):
        Flow(frequency_weight=-1.0)
