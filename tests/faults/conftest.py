"""What the fault tests share: per module a config and the run that nobody disturbed.

A module says by `CHANGES` in what its config differs from `harness.tiny_config`, such as {"train__steps": 10}.
"""

import pathlib

import pytest
from faults import harness

from dip_jax.config import Config
from dip_jax.errors import Exit


@pytest.fixture(scope="module")
def changed(request, dataset):
    """Makes the module's config with further changes."""

    def change(**changes: object) -> Config:
        return harness.tiny_config(dataset, **request.module.CHANGES | changes)

    return change


@pytest.fixture(scope="module")
def config(changed) -> Config:
    return changed()


@pytest.fixture(scope="module")
def reference(nursery, config, tmp_path_factory) -> pathlib.Path:
    """The workdir of an undisturbed run of one process."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    code, log = nursery.run(config, workdir)
    assert code == Exit.DONE, log
    return workdir
