"""What the benchmarks share: variants are read as they are meant, times are fair, fits find the exponent."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dip_jax import config
from dip_jax.errors import UserError

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import measuring
import scaling
import start


def test_variants_are_read_by_the_types_of_the_config():
    table = measuring.variants("base;other:scan_layers=False,batch=3,interval=0.0/1.0")
    assert list(table) == ["base", "other"] and table["base"] == {}
    assert measuring.with_settings(config.Model(), table["other"]).scan_layers is False
    sample = measuring.with_settings(config.Sample(), table["other"])
    assert sample.interval == (0.0, 1.0)
    assert measuring.with_settings(config.Model(), {"head_width": "8"}).head_width == 8
    with pytest.raises(UserError, match=r"'scan_layers' where key=value is expected"):
        measuring.variants("a:scan_layers")


def test_variants_take_turns_and_the_first_round_does_not_count(capsys):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measuring.interleave(calls, rounds=3)
    assert "".join(order) == "abbaabba"
    assert all(row["low"] <= row["seconds"] <= row["high"] for row in times.values())


def test_a_build_knows_its_flops_and_comes_from_the_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    built = measuring.build(lambda x: x @ x, jnp.ones((32, 32)))
    assert built.xla_flops == 2 * 32**3
    assert built.cold > 0 and built.warm > 0
    assert jax.config.jax_compilation_cache_dir == before


def test_fit_finds_the_exponent():
    points = [{"x": x, "seconds": 0.5 * x**2, "flops": 7 * x} for x in (2, 4, 8)]
    found = scaling.fit(points)
    assert found["exponent"] == pytest.approx(2) and found["exponent_flops"] == pytest.approx(1)
    line = scaling.fit([{"x": x, "seconds": 1 + 2 * x, "flops": x} for x in (1, 2, 3)])
    assert line["line"] == pytest.approx([1, 2]) and line["deviation"] < 1e-9


def test_a_run_is_recorded_with_all_that_repeats_it(tmp_path):
    out = tmp_path / "run.json"
    measuring.save("x", {"size": "tiny"}, [{"seconds": 1.0}], out=out)
    run = json.loads(out.read_text())
    assert set(run) >= {"command", "revision", "hardware", "versions", "config", "rows", "load", "clock"}
    assert run["versions"]["jax"] == jax.__version__ and len(run["revision"].split("+")[0]) == 40


@pytest.mark.slow
def test_an_executable_made_ahead_draws_the_same_image_without_tracing(tmp_path):
    command = [sys.executable, start.__file__, "--size=tiny", "--image_size=32", f"--folder={tmp_path}"]

    def run(mode: str, steps: int = 2) -> dict[str, float]:
        done = subprocess.run([*command, f"--mode={mode}", f"--steps={steps}"], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    cold, made, loaded = (run(mode) for mode in ("cold", "ahead", "ahead"))
    assert cold["sum"] == made["sum"] == loaded["sum"] != run("cold", steps=3)["sum"]
    assert made["trace"] > 0 and loaded["trace"] == 0
