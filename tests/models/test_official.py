"""The authors' DiP: weights under their names, converted and loaded, give what their PyTorch network answered."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity_cases
import pytest
from safetensors.numpy import save_file

import dip_jax
from dip_jax import config
from dip_jax.jobs import convert
from dip_jax.models import detailers, patches

BOUND = 2e-5  # of the output's standard deviation


class Feature(nn.Module):
    """A head without parameters whose pixels are the values of SiLU(t_emb + s), which the official head reads."""

    config: config.Model

    @nn.compact
    def __call__(self, p, s, t_emb):
        values = nn.silu(t_emb.astype(jnp.float32) + s.astype(jnp.float32))
        return jnp.zeros(p.size).at[: values.size].set(values).reshape(p.shape)


@pytest.fixture(scope="module", params=parity_cases.official_cases())
def case(request, tmp_path_factory):
    """(their answers, our model, our parameters)"""
    folder, model = tmp_path_factory.mktemp("official"), parity_cases.official_model(request.param)
    save_file(parity_cases.official_tensors(request.param), folder / "w.safetensors")
    options = {"image_size": model.image_size, "dtype": "float32"}
    convert.convert("dip", checkpoint=folder / "w.safetensors", out=folder / "run", **options)
    loaded, params = dip_jax.load(folder / "run")
    assert loaded.config == model
    return parity_cases.official_answers(request.param), loaded, params


def run(model, params, answers):
    return jax.jit(model.apply)(params, answers["x"], answers["t"], answers["y"])


def test_the_velocity_is_theirs(case):
    answers, model, params = case
    np.testing.assert_allclose(run(model, params, answers), answers["v"], rtol=0, atol=BOUND * answers["v"].std())


def test_the_feature_that_the_head_reads_is_theirs(case, monkeypatch):
    answers, model, params = case
    monkeypatch.setitem(detailers.HEADS, "feature", Feature)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, head="feature"))
    pixels = run(model, {name: leaf for name, leaf in params.items() if name != "head"}, answers)
    features = patches.patchify(pixels, model.config.patch_size).reshape(2, answers["s"].shape[1], -1)
    np.testing.assert_allclose(features[..., : model.config.width], answers["s"], rtol=0, atol=BOUND * answers["s"].std())
