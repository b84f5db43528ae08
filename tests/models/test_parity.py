"""Outputs equal those of the public PyTorch modules (PixNerd, DDT) that `benchmarks/parity_golden.py` recorded."""

import dataclasses

import jax
import numpy as np
import parity_cases
import pytest

from dip_jax.jobs import convert
from dip_jax.models import dip

QUICK = (384, 256)


def _marked(case: parity_cases.Case):
    slow = (case.width, case.image_size) != QUICK
    return pytest.param(case, id=case.name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("case", [_marked(case) for case in parity_cases.CASES])
def test_outputs_equal_those_of_the_pytorch_module(case):
    with np.load(parity_cases.ANSWERS) as golden:
        expected, scale = golden[case.name], golden[f"{case.name}/scale"]
    model, params = convert.from_tensors(parity_cases.random_tensors(case), source=case.source, image_size=case.image_size)
    network = dip.from_config(dataclasses.replace(model, dtype="float32"))
    output = parity_cases.thin(jax.jit(network.apply)(params, *parity_cases.inputs(case)))
    np.testing.assert_allclose(output, expected, atol=2e-5 * scale, rtol=0)
