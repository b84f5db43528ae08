"""Names of machines, and what is read from the programs of their compilers: on text that these wrote, without them."""

import importlib.util
import json
import math
import re

import pytest
from small_models import small

from dip_jax import __main__, config
from dip_jax.errors import UserError
from dip_jax.planning import ahead, cycles, hlo, machine, overlap, topologies


@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [
        ("v5e-16", (4, 4), 16),
        ("v5litepod-16", (4, 4), 16),
        ("v6e-8", (2, 4), 8),
        ("v5p-64", (2, 4, 4), 32),  # TensorCores
        ("2xv5e-256", (16, 16), 512),
        ("h100x8", (1, 1, 8), 8),
        ("h200x16", (1, 2, 8), 16),
        ("h100x3", (1, 1, 3), 3),
    ],
)
def test_names_people_rent(name, shape, devices):
    found = topologies.parse(name)
    assert (found.shape, found.devices) == (shape, devices)
    assert str(devices) in found.described and ("TensorCores" in found.described) == (name == "v5p-64")


def test_every_slice_has_the_chips_of_its_name():
    for kind, row in topologies.GENERATIONS.items():
        for number in row.shapes:
            found = topologies.parse(f"{kind}-{number}")
            assert found.devices == number // (2 if kind == "v5p" else 1) == math.prod(found.shape)


@pytest.mark.parametrize(
    ("name", "told"),
    [("v5p-65", "TensorCores, two to a chip"), ("v6e-7", "have 1, 4, 8"), ("a100x8", "h100x8"), ("h100x12", "whole nodes")],
)
def test_other_names_are_one_line(name, told):
    with pytest.raises(UserError, match=told):
        topologies.parse(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e-8", "aot-tpu"), ("h100x8", "aot-gpu")])
def test_without_the_compiler_one_line_says_how_to_install_it(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wheel: None)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
        topologies.require_compiler(topologies.parse(name))


def test_a_job_without_a_machine_is_one_line(capsys, tmp_path):
    file = tmp_path / "any.py"
    file.write_text("from dip_jax.config import defaults as get_config\n")
    assert __main__.main(["info", f"--config={file}", "--job=sample"]) == 2
    assert "needs --topology" in capsys.readouterr().err


def test_a_mesh_of_another_size_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wheel: True)
    file = tmp_path / "any.py"
    file.write_text("from dip_jax.config import defaults as get_config\n")
    assert __main__.main(["info", f"--config={file}", "--topology=v5e-8", "--mesh=data:4"]) == 2
    assert "8 devices of --topology" in capsys.readouterr().err


_TPU = """HloModule jit_run, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add (a: bf16[]) -> bf16[] {
  ROOT %a = bf16[] parameter(0)
}

%start (p.0: bf16[1,64]) -> (bf16[1,64], bf16[1,256], u32[]) {
  %p.0 = bf16[1,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,256]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %call.1 = (bf16[1,64], bf16[1,256], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.1: bf16[1,64], p.2: bf16[8,8]) -> bf16[8,8] {
  %p.1 = bf16[1,64]{1,0} parameter(0)
  %p.2 = bf16[8,8]{1,0} parameter(1)
  %all-gather.2 = bf16[1,256]{1,0} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %convolution.1 = bf16[8,8]{1,0} convolution(%p.2, %p.2), dim_labels=bf_io->bf
}

%done (p.3: bf16[1,64]) -> bf16[1,256] {
  %p.3 = bf16[1,64]{1,0} parameter(0)
  %all-gather.3 = bf16[1,256]{1,0} all-gather(%p.3), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %custom-call.2 = bf16[1,256]{1,0} custom-call(%p.3, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.5 (p.4: bf16[256,256]) -> bf16[256,64] {
  %p.4 = bf16[256,256]{1,0} parameter(0)
  %all-reduce.1 = bf16[256,256]{1,0} all-reduce(%p.4), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[256,64]{1,0} dynamic-slice(%all-reduce.1)
}

%body (p.5: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %p.5 = (s32[], bf16[8,8]{1,0}) parameter(0)
  %async-start = (bf16[1,64]{1,0}, bf16[1,256]{1,0}, u32[]) fusion(%p.5), kind=kCustom, calls=%start
  %fusion.1 = bf16[8,8] fusion(%p.5), calls=%async_collective_fusion.1, NAME(jvp(N)/while/body/blocks/dot), CYCLES(100)
  %async-done = bf16[1,256]{1,0} fusion(%async-start), kind=kCustom, calls=%done
  %fusion.2 = bf16[256,64]{1,0} fusion(%fusion.1), kind=kCustom, calls=%all-reduce-scatter.5, CYCLES(10)
  ROOT %tuple.1 = (s32[], bf16[8,8]{1,0}) tuple(%p.5, %fusion.1)
}

%condition (p.6: (s32[], bf16[8,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(26)
  %p.6 = (s32[], bf16[8,8]{1,0}) parameter(0)
  ROOT %compare.1 = pred[] compare(%p.6, %constant.1), direction=LT
}

ENTRY %main (p.7: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %p.7 = (s32[], bf16[8,8]{1,0}) parameter(0)
  %fusion.3 = f32[8,8]{1,0} fusion(%p.7), kind=kLoop, calls=%add, NAME(jit(run)/transpose(jvp(N))/head/conv), CYCLES(7)
  ROOT %while.1 = (s32[], bf16[8,8]{1,0}) while(%p.7), condition=%condition, body=%body
}
"""
TPU = re.sub(r"NAME\((.*?)\)(?=, CYCLES)", r'metadata={op_name="\1"}', _TPU)
TPU = re.sub(r"CYCLES\((\d+)\)", r'backend_config={"estimated_cycles":"\1"}', TPU)


def test_a_tpu_program_repeats_a_collective_that_is_one():
    gather, scatter = hlo.collectives(TPU)
    assert (gather.kind, gather.size, gather.count, gather.channel) == ("all-gather", 512, 26, 7)
    assert (scatter.kind, scatter.size, scatter.count, scatter.group) == ("reduce-scatter", 256 * 256 * 2, 26, (0, 1, 2, 3))


def test_what_is_split_around_products_is_hidden():
    assert overlap.hidden_channels(TPU) == {7}
    product = next(line for line in TPU.splitlines() if "%convolution.1 =" in line)
    assert overlap.hidden_channels(TPU.replace(product, product.replace("convolution(", "add("))) == set()


def test_a_gpus_pair_of_start_and_done():
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %all-reduce-start = f32[8]{0} all-reduce-start(%p), channel_id=3, replica_groups={{0,1}}, to_apply=%add
  %gemm = f32[8]{0} custom-call(%p), custom_call_target="__cublas$gemm"
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
}
"""
    assert overlap.hidden_channels(text) == {3}
    assert overlap.hidden_channels(text.replace("__cublas$gemm", "Sharding")) == set()


def test_estimated_cycles_count_as_often_as_their_loop_runs():
    assert cycles.by_part(TPU) == {"blocks, forward": 2600, "update and the rest": 260, "head, backward": 7}
    loop = next(line for line in TPU.splitlines() if "while(" in line)
    branches = "  ROOT %c = f32[] conditional(%p.7), true_computation=%body, false_computation=%all-reduce-scatter.5"
    assert cycles.by_part(TPU.replace(loop, branches))["blocks, forward"] == 100
    other = branches.replace("%all-reduce-scatter.5", "%body")
    assert cycles.by_part(TPU.replace(loop, other))["blocks, forward"] == 100  # one of two, not both


def test_allocations_on_the_device():
    text = (
        "allocation 0: size 512, thread-local:\nallocation 1: size 1000, parameter 9, shape |f32[3]| at ShapeIndex {}, "
        "maybe-live-out:\n value: <1> (size=1000,offset=0): f32[3]\nallocation 2: size 70, preallocated-temp:\n"
        "allocation 3: size 9999, color 1, preallocated-temp:\n"
    )
    assert ahead.read_allocations(text) == (1000, 582)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.15G) exceeds", 19.15),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.84G of 15.75G hbm.", 18.84),
        ("INTERNAL: (19.15G) exceeds", 0),
    ],
)
def test_the_compilers_out_of_memory(message, gib):
    assert ahead._needed(message) == int(gib * 2**30)


def test_changes_to_try_keep_the_batch_and_divide_it():
    whole = config.Config(model=small().config, data=config.Data(batch_size=64))
    found = machine.changes(whole, devices=8, job="train")
    assert [flags for flags, _ in found][:2] == [
        "--config.mesh.zero1=True",
        "--config.mesh.zero1=True --config.model.remat=full",
    ]
    assert found[0][1].mesh.zero1 and found[1][1].model.remat == "full"
    assert [changed.optim.accumulate for _, changed in found[2:]] == [2, 4, 8]
    assert all(changed.data == whole.data for _, changed in found)
    halves = machine.changes(whole, devices=8, job="sample")
    assert [changed.sample.batch_size for _, changed in halves] == [32, 16, 8, 4, 2, 1]


def test_both_verdicts_are_written_out():
    gather = hlo.Collective("all-gather", 10**6, (0, 1), 3, "", (), 7)
    mesh = {"data": 2, "fsdp": 1, "tensor": 1}
    found = ahead.Compiled(mesh, 2**30, 2**29, 0, True, (gather,), (7,), {"head, forward": 1500}, {}, (1.0, 2.0))
    facts = {"machine": "m", "job": "train", "mesh": mesh, "fits": True, "kernels": {"__cudnn$conv": 4}, "clock": 1.5e9}
    facts |= {"bytes_per_device": {"available": 2**31, "state": 2**30, "temporaries": 2**29, "left": 2**29}}
    facts |= {"collectives": machine._totals(found), "cycles": found.cycles, "updated_in_place": True, "machine_code": True}
    facts["untiled"] = "proj/dot"
    text = "\n".join(machine.lines(json.loads(json.dumps(facts | {"trace_seconds": 1.0, "compile_seconds": 2.0}))))
    assert "0.500 GiB  of the device's memory" in text and "100%" in text and "not measured" in text and "__cudnn$conv" in text
    assert "found no tiling of its own for proj/dot" in text
    facts |= {"fits": False, "bytes_per_device": {"available": 2**30, "needed": 2**31}}
    change = {"flags": "--config.model.remat=full", "needed": 2**29}
    assert "needs 2.00 GiB per device, of 1.00; fits with --config.model.remat=full (0.50 GiB)" in "\n".join(
        machine.lines(facts | {"change": change})
    )
    assert "take more devices" in "\n".join(machine.lines(facts | {"change": None}))


def test_of_a_compilers_last_words_the_line_that_names_what_is_wrong():
    said = "jax.errors.JaxRuntimeError: INTERNAL: no tiling for %dot.1"
    assert ahead._complaint(f"Traceback:\n  File x\n{said}\n\tSymbolic tile\n  <frozen>:198:11 [_run]\n") == said
    assert ahead._complaint("\n") == "nothing said" and ahead._complaint("Killed\n") == "Killed"


def test_the_product_that_the_gpus_compiler_could_not_tile():
    said = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.1 = bf16[67,8]{1,0} dot(%a), metadata={op_name="
    assert ahead._untiled(f'{said}"jit(f)/proj/dot_general" stack_frame_id=1}}\n\tSymbolic tile') == "jit(f)/proj/dot_general"
    assert ahead._untiled('INTERNAL: another, metadata={op_name="jit(f)"}') == ""
