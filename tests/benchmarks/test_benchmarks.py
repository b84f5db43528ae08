"""What the benchmarks share: variants are read as they are meant, times are fair, fits find the exponent."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from places import ROOT

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.planning import cycles

sys.path.append(str(ROOT / "benchmarks"))

import estimates
import heads_cost
import measuring
import sample_levers
import scaling
import start

BENCHMARKS = pathlib.Path(start.__file__).parent


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
    assert times["a"]["speed_low"] == times["a"]["speed"] == times["a"]["speed_high"] == 1


def test_speed_is_taken_round_by_round_beside_the_first(monkeypatch):
    clock, spent = [0.0], {"a": iter((9, 2, 8, 3)), "b": iter((9, 1, 2, 3))}
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def call(name: str) -> None:
        clock[0] += next(spent[name])

    times = measuring.interleave({name: lambda name=name: call(name) for name in "ab"}, rounds=3)
    assert (times["a"]["seconds"], times["b"]["seconds"], times["b"]["speed"]) == (3, 2, 2)
    assert (times["b"]["speed_low"], times["b"]["speed_high"]) == (1, 4)


def test_a_build_knows_its_flops_and_comes_from_the_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    built = measuring.build(lambda x: x @ x, jnp.ones((32, 32)))
    assert built.xla_flops == 2 * 32**3
    assert built.cold > 0 and built.warm > 0
    assert jax.config.jax_compilation_cache_dir == before


PROGRAM = re.sub(
    r"COST (\d+)",
    r'backend_config={"estimated_cycles":"\1"}',
    """HloModule step

%dear (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  %add.0 = f32[4]{0} add(%p.1, %p.1)
  ROOT %add.1 = f32[4]{0} add(%add.0, %p.1), metadata={op_name="jit(step)/cond/reduce_sum"}, COST 30
}

%cheap (p.2: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  %copy.0 = f32[4]{0} copy(%p.2)
  %copy.1 = f32[4]{0} copy(%copy.0)
  ROOT %copy.2 = f32[4]{0} copy(%copy.1), metadata={op_name="jit(step)/cond/copy"}, COST 7
}

%fused_copy (p.3: f32[4]) -> f32[4] {
  %p.3 = f32[4]{0} parameter(0)
  ROOT %negate.3 = f32[4]{0} negate(%p.3)
}

ENTRY %main (p: f32[4], i: s32[]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %i = s32[] parameter(1)
  %copy.3 = f32[4]{0} copy(%p), COST 5
  %copy_fusion.1 = f32[4]{0} fusion(%copy.3), kind=kLoop, calls=%fused_copy, metadata={op_name="jit(step)/head/mul"}, COST 2
  ROOT %conditional = f32[4]{0} conditional(%i, %p, %p), branch_computations={%cheap, %dear}, COST 37
}
""",
)


def test_an_estimate_counts_the_dearest_branch_and_names_what_only_moves():
    assert [spent for spent, _, _ in cycles.costs(PROGRAM)] == [30, 5, 2]
    assert estimates.rest(PROGRAM) == {"norm": 30, "else": 5}
    assert estimates.moves(PROGRAM) == 7
    counted = estimates.launches(PROGRAM)
    rest = "update and the rest"
    assert counted == {(rest, "copy"): 1, (rest, "conditional"): 1, (rest, "add"): 2, ("head, forward", "copy_fusion"): 1}
    counts = {part: {kind: n for kind, n in row.items() if n} for part, row in estimates.told(counted).items()}
    assert counts == {rest: {"kernels": 3, "moves": 1, "waits": 1}, "head, forward": {"kernels": 1, "moves": 1}}
    moves = re.compile(estimates.KINDS["moves"])
    assert all(map(moves.search, ("copy", "loop_slice_fusion", "dynamic-slice", "wrapped_concatenate", "pad")))
    assert not any(
        map(moves.search, ("copy-start", "dynamic-update-slice", "loop_dynamic_update_slice_fusion", "loop_add_fusion"))
    )


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


@pytest.mark.parametrize("status", ["", " M dip_jax/flow.py", "?? benchmarks/new.py"])
def test_a_run_of_changed_or_untracked_code_says_so(tmp_path, monkeypatch, status):
    def git(*arguments: str) -> str:
        if arguments[0] == "rev-parse":
            return "0" * 40
        return "" if "--untracked-files=no" in arguments and status.startswith("??") else status

    monkeypatch.setattr(measuring, "_git", git)
    path = measuring.save("x", {}, [], out=tmp_path / "run.json")
    assert json.loads(path.read_text())["revision"] == "0" * 40 + ("+changes" if status else "")


@pytest.mark.parametrize("name", ["gpu.sh", "tpu.sh"])
def test_what_the_script_of_a_device_offers_is_what_it_runs(name):
    text = (BENCHMARKS / name).read_text()
    usage = re.search(rf"{name} ([a-z|]+) \[", text)[1].split("|")
    shown = re.findall(r"^#   ([a-z]+)  ", text, re.MULTILINE)
    runs = dict(re.findall(r"^  ([a-z]+)\) exec \S+ (\S+)", text, re.MULTILINE))
    said = re.search(r"it is one of ([a-z, ]+)", text)[1].split(", ")
    assert usage == shown == list(runs) == said
    assert all((BENCHMARKS.parent / script).is_file() for script in runs.values())
    done = subprocess.run(["bash", BENCHMARKS / name, "--help"], check=True, stdout=subprocess.PIPE, text=True)
    assert all(f"  {what} " in done.stdout for what in usage)
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("name", ["gpu.sh", "tpu.sh"])
def test_the_script_of_a_device_starts_its_benchmarks_with_flags_that_they_have(name):
    for what in re.findall(r"^  ([a-z]+)\) exec", (BENCHMARKS / name).read_text(), re.MULTILINE):
        command, environment = ["bash", BENCHMARKS / name, what, "--rounds=1"], os.environ | {"PYTHON": "echo"}
        asked = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        script, *flags = asked.split()
        source = (BENCHMARKS.parent / script).read_text()
        known = {name for name in re.findall(r"--\w+", asked) if name in source or f'"{name[2:]}"' in source}
        assert known == set(re.findall(r"--\w+", asked)) and flags[-1] == "--rounds=1"
        for settings in measuring.variants(asked.partition("--variants=")[2].split(" ")[0]).values():
            fields = {field.name for section in (config.Model, config.Sample) for field in dataclasses.fields(section)}
            assert set(settings) <= fields | {"batch"}


@pytest.mark.slow
def test_levers_of_sampling_change_no_image(tmp_path, monkeypatch):
    flags = ["--size=tiny", "--image_size=32", "--steps=2", "--rounds=1", "--dtype=bfloat16", f"--out={tmp_path / 'run.json'}"]
    monkeypatch.setattr(sys, "argv", ["sample_levers.py", *flags])
    sample_levers.main()
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert {row["variant"]: row["difference"] for row in rows} == {"plain": 0, "ahead": 0, "cast": 0, "both": 0}
    assert all(row["seconds"] > 0 and row["speed"] > 0 for row in rows)


@pytest.mark.slow
def test_the_cost_of_heads_is_theirs_beside_none(tmp_path, monkeypatch, capsys):
    flags = ["--size=tiny", "--heads=none,unet", "--rounds=1", f"--out={tmp_path / 'run.json'}"]
    monkeypatch.setattr(sys, "argv", ["heads_cost.py", *flags])
    heads_cost.main()
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]["measured"]["rows"]
    assert rows["unet"]["forward_seconds"] > 0 and rows["none"]["forward_seconds"] > 0
    assert rows["unet"]["train_bytes"] > rows["none"]["train_bytes"] > 0
    assert "| unet |" in (tmp_path / "run.md").read_text()
    monkeypatch.setattr(sys, "argv", ["heads_cost.py", "--heads=unet"])
    with pytest.raises(SystemExit):
        heads_cost.main()
    assert "none, then some of mlp" in capsys.readouterr().err


@pytest.mark.slow
def test_an_executable_made_ahead_draws_the_same_image_without_tracing(tmp_path):
    command = [sys.executable, start.__file__, "--size=tiny", "--image_size=32", f"--folder={tmp_path}"]

    def run(mode: str, steps: int = 2) -> dict[str, float]:
        done = subprocess.run([*command, f"--mode={mode}", f"--steps={steps}"], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    cold, made, loaded = (run(mode) for mode in ("cold", "ahead", "ahead"))
    assert cold["sum"] == made["sum"] == loaded["sum"] != run("cold", steps=3)["sum"]
    assert made["trace"] > 0 and loaded["trace"] == 0


# The scripts that run other people's code: their options of checkouts.
BESIDE = {
    "adm_parity": ["evaluator"],
    "half_precision": ["pixnerd"],
    "official_sampling": ["checkout"],
    "official_training": ["checkout", "dinov2"],
    "options_golden": ["deco", "internal-guidance", "pixelrepa", "lakonlab"],
    "parity_dinov2": ["dinov2"],
    "parity_golden": ["dip", "pixnerd", "ddt"],
    "peers": ["pixnerd"],
}


def test_every_script_that_takes_a_checkout_is_known():
    taking = {path.stem for path in BENCHMARKS.glob("*.py") if re.search(r"heckout of|clone of", path.read_text())}
    assert taking - {"checkouts"} == set(BESIDE)


@pytest.mark.parametrize("there", [True, False], ids=["another folder", "no folder"])
@pytest.mark.parametrize("script", BESIDE)
def test_a_wrong_checkout_is_one_line(script, there, tmp_path):
    """Also without PyTorch, which then is the line; with it by an empty package of that name."""
    for name in ("torch", "torchvision", "timm", "transformers", "lightning", "einops"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(FAKE_TORCH)
    wrong = tmp_path if there else tmp_path / "nowhere"
    command = [sys.executable, BENCHMARKS / f"{script}.py", *(f"--{option}={wrong}" for option in BESIDE[script])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "packages")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith(f"{script}.py: --{BESIDE[script][0]}={wrong} "), done.stderr
    assert ("has no " if there else "is no folder") in line and ": give a checkout of https://github.com/" in line


FAKE_TORCH = """
import types
class float32: pass
class Tensor: pass
class nn:
    class Module: pass
def no_grad():
    return lambda function: function
"""


@pytest.mark.parametrize("script", sorted(set(BESIDE) - {"adm_parity"}))
def test_without_pytorch_it_is_one_line_too(script, tmp_path):
    if importlib.util.find_spec("torch"):
        pytest.skip("PyTorch is installed here")
    command = [sys.executable, BENCHMARKS / f"{script}.py", *(f"--{option}={tmp_path}" for option in BESIDE[script])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith(f"{script}.py: needs torch"), done.stderr
