"""Outputs equal those of the public PyTorch modules (PixNerd, DDT) that `benchmarks/parity_golden.py` recorded."""

import jax
import numpy as np
import parity_cases
import pytest

from dip_jax.checkpoints import torch_names
from dip_jax.models import dip

QUICK = (384, 256)


def _marked(case: parity_cases.Case):
    slow = (case.width, case.image_size) != QUICK
    return pytest.param(case, id=case.name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("case", [_marked(case) for case in parity_cases.CASES])
def test_outputs_equal_those_of_the_pytorch_module(case):
    with np.load(parity_cases.ANSWERS) as golden:
        expected, scale = golden[case.name], golden[f"{case.name}/scale"]
    tensors = parity_cases.random_tensors(case)
    model, params = torch_names.to_params(tensors, source=case.source, image_size=case.model.image_size, dtype="float32")
    assert model == case.model
    output = parity_cases.thin(jax.jit(dip.from_config(model).apply)(params, *parity_cases.inputs(case)))
    np.testing.assert_allclose(output, expected, atol=2e-5 * scale, rtol=0)
