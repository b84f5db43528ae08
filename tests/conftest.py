"""Strict settings for every test: 8 CPU devices, strict dtypes and ranks, typed signatures, a persistent compilation cache."""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised code is ready five times sooner.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_cache = os.environ.get("DIP_TEST_CACHE", str(pathlib.Path(tempfile.gettempdir()) / "dip_jax_test_cache"))
jax.config.update("jax_compilation_cache_dir", _cache)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache)  # of commands that tests start, which else keep it in the home
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags

install_import_hook("dip_jax", "beartype.beartype")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
pytest.register_assert_rewrite("aot_programs")  # its checks say what they saw


def pytest_addoption(parser):
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/golden/ instead of comparing")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--campaign", action="store_true", help="run the tests marked campaign (full counts)")
    parser.addoption("--aot", action="store_true", help="run the tests marked aot (the accelerators' own compilers)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With xdist's -n each file stays with one process, for its fixtures, in the order of the collection (below); without
    xdist there is nothing to say."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    for tier in ("slow", "campaign", "aot"):
        if not config.getoption(f"--{tier}"):
            for item in items:
                if tier in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"needs --{tier}"))
    # Files with long tests first: one that starts last keeps a single process busy while the others have nothing left.
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def toy_features(monkeypatch):
    """`toy_network` in the place of lite0."""
    import toy_network

    from dip_jax.metrics import features

    monkeypatch.setitem(features.NETWORKS, "lite0", lambda weights: toy_network.network())
    features.open_network.cache_clear()
    yield
    features.open_network.cache_clear()


@pytest.fixture
def update_goldens(request) -> bool:
    return request.config.getoption("--update-goldens")


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """The process from which children are forked: see `faults.harness`."""
    from faults import harness  # not before the settings above

    with harness.Nursery(tmp_path_factory.mktemp("logs")) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> pathlib.Path:
    """Random images of three classes; nobody may write there."""
    from faults import harness

    return harness.make_dataset(tmp_path_factory.mktemp("data") / "set")
