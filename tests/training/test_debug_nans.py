"""JAX's own switch for finding a NaN works with the training step."""

import jax
import pytest
from faults import harness

from dip_jax.jobs import train


def test_the_operation_that_makes_a_nan_is_named(dataset, tmp_path):
    jax.config.update("jax_debug_nans", True)
    try:
        with pytest.raises(FloatingPointError, match=r"nan.* encountered in \w+"):
            train.train(harness.tiny_config(dataset, train__steps=4, optim__learning_rate=1e30), workdir=tmp_path / "run")
    finally:
        jax.config.update("jax_debug_nans", False)
