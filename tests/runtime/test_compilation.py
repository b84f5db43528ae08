"""What is compiled is kept for the next command, in one folder per user, within a limit and without a lock."""

import json
import os
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest
from places import ROOT

from dip_jax import config
from dip_jax.checkpoints import checkpoint
from dip_jax.models import dip
from dip_jax.runtime import compilation

COUNTING = """
import json, sys, jax
from dip_jax import __main__
events = []
jax.monitoring.register_event_listener(lambda name, **told: events.append(name.rpartition("/")[2]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # a small model's
code = __main__.main(sys.argv[1:])
print(json.dumps({"code": code, "compiled": events.count("cache_misses"), "found": events.count("cache_hits")}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    sizes = {"depth": 1, "width": 16, "num_heads": 2, "patch_size": 8, "image_size": (16, 16), "num_classes": 3}
    run = config.Config(model=config.Model(size="tiny", head="none", dtype="float32", **sizes))
    checkpoint.write_weights(folder, jax.jit(dip.from_config(run.model).init)(jax.random.key(0)), config=run)
    return folder


def draw(weights, cache, out, **environment):
    """One `sample` in a new process, not waited for."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), **environment}
    command = [
        sys.executable,
        "-c",
        COUNTING,
        "sample",
        f"--checkpoint={weights}",
        "--num_samples=3",
        "--steps=3",
        f"--out={out}",
    ]
    return subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def counts(process) -> dict[str, int]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "persistent compilation cache" not in err, err
    told = json.loads(out.splitlines()[-1])
    assert told.pop("code") == 0, err
    return told


def images(path):
    with np.load(path) as file:
        return file["arr_0"]


def entries(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_the_second_sample_compiles_less_and_draws_the_same(weights, tmp_path):
    cache = tmp_path / "cache"
    first = counts(draw(weights, cache, tmp_path / "first.npz"))
    kept = entries(cache / "dip_jax" / "xla")
    second = counts(draw(weights, cache, tmp_path / "second.npz"))
    assert first["compiled"] > 0 and first["found"] == 0 and len(kept) == first["compiled"]
    assert second == {"compiled": 0, "found": first["compiled"]} and entries(cache / "dip_jax" / "xla") == kept
    np.testing.assert_array_equal(images(tmp_path / "first.npz"), images(tmp_path / "second.npz"))
    assert (cache / "dip_jax" / "xla").stat().st_mode & 0o777 == 0o700


def test_another_folder_is_respected_and_the_switch_keeps_nothing(weights, tmp_path):
    counts(draw(weights, tmp_path / "cache", tmp_path / "a.npz", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")))
    assert entries(tmp_path / "own") and not (tmp_path / "cache").exists()
    told = counts(draw(weights, tmp_path / "cache", tmp_path / "b.npz", JAX_ENABLE_COMPILATION_CACHE="false"))
    assert told["found"] == 0 and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_processes_share_a_folder_that_is_swept_under_them(weights, tmp_path):
    cache, outs = tmp_path / "cache", [tmp_path / f"{i}.npz" for i in range(3)]
    running = [draw(weights, cache, out) for out in outs]
    while any(process.poll() is None for process in running):
        compilation.sweep(cache / "dip_jax" / "xla", limit=0)
    assert all(counts(process)["compiled"] >= 0 for process in running)
    for out in outs[1:]:
        np.testing.assert_array_equal(images(outs[0]), images(out))


@pytest.mark.parametrize("harm", ["a file in its way", "writable for all", "of another user"])
def test_a_folder_that_is_not_the_users_own_is_not_used(harm, tmp_path, monkeypatch):
    folder = tmp_path / "dip_jax" / "xla"
    if harm == "a file in its way":
        (tmp_path / "dip_jax").write_text("")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777 if "all" in harm else 0o700)
        monkeypatch.setattr(os, "getuid", lambda: 12345) if "user" in harm else None
    assert not compilation._is_ours(folder)


def entry(folder, name, *, size=1000, age=0.0):
    """An entry as JAX writes it, last used so many seconds ago."""
    data = zlib.compress(np.random.default_rng(0).bytes(size))
    path = folder / f"jit_{name}-cache"
    path.write_bytes(data)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_longest_unused_go_first_and_what_is_no_entry_stays(tmp_path):
    compilation.sweep(tmp_path, limit=0)  # what is older than this is not read, which would be a use
    ages = {"young": 10, "old": 3000, "older": 4000, "oldest": 5000}
    paths = {name: entry(tmp_path, name, age=age) for name, age in ages.items()}
    os.utime(paths["older"], (time.time() - 5, time.time() - 4000))  # written long ago, read just now
    (tmp_path / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    (tmp_path / "jit_oldest-atime").write_text("")
    size = paths["old"].stat().st_size
    compilation.sweep(tmp_path, limit=4 * size)
    assert len(entries(tmp_path)) == 4
    compilation.sweep(tmp_path, limit=2 * size + 1)
    assert entries(tmp_path) == ["jit_older-cache", "jit_young-cache"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in entries(tmp_path)) == [
        "swept",
        "xla_gpu_per_fusion_autotune_cache_dir",
    ]


def test_an_entry_that_was_cut_off_goes_and_each_is_looked_at_once(tmp_path, monkeypatch):
    whole, cut, empty = (entry(tmp_path, name) for name in ("whole", "cut", "empty"))
    cut.write_bytes(cut.read_bytes()[:-10])
    empty.write_bytes(b"")
    other = tmp_path / "jit_other-cache"
    other.write_bytes(b"\x28\xb5\x2f\xfd of another compression")
    compilation.sweep(tmp_path, limit=10**6)
    assert entries(tmp_path) == sorted([whole.name, other.name])
    for path in (whole, other):
        os.utime(path, (0, 0))
    monkeypatch.setattr(compilation, "_is_whole", lambda path: pytest.fail("read again"))
    compilation.sweep(tmp_path, limit=10**6)


def test_a_folder_that_is_gone_stops_nobody(tmp_path):
    compilation.sweep(tmp_path / "gone", limit=0)
