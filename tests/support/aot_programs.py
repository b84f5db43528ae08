"""Small programs of the accelerators' own compilers, and what must hold in every one of them.

Small in depth and width; the programs are otherwise those of DiP-XL. By the batch, the images on a
device, alone or times the tokens, are a number that no weight has as a side: products of activations are known by it.
"""

import dataclasses
import functools
import importlib.util
import math
import pathlib
import re
import tempfile

import jax
import pytest

from dip_jax import config
from dip_jax.jobs import info
from dip_jax.planning import ahead, hlo, topologies
from dip_jax.training import optim, repa, state

TPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e '.[aot-tpu]'")
GPU = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs pip install -e '.[aot-gpu]'")
LAYERS, BATCH, TOKENS, CONTEXT = 5, 160, 64, 16
BASE = config.Model(
    size="tiny",
    depth=LAYERS,
    width=256,
    num_heads=4,
    patch_size=16,
    image_size=(128, 128),
    num_classes=10,
    head="none",
    head_width=64,
    head_depth=2,
    inject_after=2,
)
WHOLE = config.Config(model=BASE, data=config.Data(batch_size=BATCH))
MESHES = {
    "one": config.Mesh(data=1),
    "data": config.Mesh(data=-1),
    "fsdp": config.Mesh(data=1, fsdp=-1),
    "zero1": config.Mesh(data=-1, zero1=True),
    "tensor": config.Mesh(data=-1, tensor=2),
    "mixed": config.Mesh(data=-1, fsdp=2, tensor=2),
}
# Products of activations that are float32 by design: attention's logits, the gradient by its softmax, t's embedding, the
# teacher's resize.
FLOAT32 = r"BTNH,BSNH->BNTS|qkh,...skh->...kqs|BNTS,BSNH->BTNH|/condition/time/|bHWc,hH->bhWc|bhWc,wW->bhwc"
# On a TPU the parts of a fused product's gradient by its input are summed in float32 and rounded once (`models/linear.py`).
SUMMED = r"transpose\(.*/(qkv|gate_up)/dot_general"


def require(machine: str) -> None:
    """Skips a test whose compiler is not installed."""
    mark = TPU if topologies.parse(machine).is_tpu else GPU
    if mark.mark.args[0]:
        pytest.skip(mark.mark.kwargs["reason"])


@functools.cache
def compiled(machine: str, mesh: str = "data", job: str = "train", whole: config.Config = WHOLE):
    """(what was read, the optimised program, the config with its mesh)."""
    topology = topologies.parse(machine)
    whole = dataclasses.replace(whole, mesh=info.fill(MESHES[mesh], devices=topology.devices))
    with tempfile.NamedTemporaryFile("r", suffix=".hlo") as file:
        found = ahead.compile_ahead(whole, topology=topology, job=job, machine_code=False, keep_text=file.name)
        return found, pathlib.Path(file.name).read_text(), whole


def changed(**sections) -> config.Config:
    """`WHOLE` with other values, by section."""
    return dataclasses.replace(
        WHOLE, **{name: dataclasses.replace(getattr(WHOLE, name), **values) for name, values in sections.items()}
    )


def state_of(whole: config.Config):
    """The training state's shapes."""
    model, aligned = ahead.dip.from_config(whole.model), repa.align(whole.repa, whole.model)
    optimizer = optim.make_optimizer(whole.optim, total_steps=whole.train.steps)
    return jax.eval_shape(functools.partial(state.create_state, model, optimizer, alignment=aligned), jax.random.key(0))


def check_train(machine: str, mesh: str, whole: config.Config = WHOLE) -> ahead.Compiled:
    """All that holds for every training step."""
    found, text, whole = compiled(machine, mesh, whole=whole)
    shapes, topology = state_of(whole), topologies.parse(machine)
    assert found.needed_bytes == 0 and found.total_bytes < topology.memory
    aliased = len(re.findall(r"\{\d+\}: \(\d+, \{\}, (?:may|must)-alias\)", text.split("\n", 1)[0]))
    assert aliased == len(jax.tree.leaves(shapes)), "a part of the state that is not updated in place"
    assert " conditional(" not in text, "a branch: the state is copied into it, and a GPU's host waits"
    images = BATCH // (found.mesh["data"] * found.mesh["fsdp"] * whole.optim.accumulate)
    vectors = images * whole.optim.accumulate * whole.model.width * 4  # of label and t: one for each image
    resharded = [one for one in found.collectives if one.kind == "all-to-all" and one.size > vectors * len(one.group)]
    assert resharded == [], "activations are resharded"
    check_gathers(found, shapes.params, mesh, vectors)
    rows = {images * n for n in (1, TOKENS, TOKENS + CONTEXT)}
    assert in_float32(text, rows=rows, tpu=topology.is_tpu) == [], "products that run in float32"
    assert linear_maps(text) == {"modulation", "qkv", "proj", "gate_up", "down"}
    if not topology.is_tpu:
        assert found.untiled == "", "a product without a tiling"
        assert found.kernels["__cudnn$fmhaSoftmax"] >= 1 and found.kernels["__cudnn$fmhaSoftmaxBackward"] >= 1
    return found


def check_gathers(found: ahead.Compiled, params, mesh: str, vectors: int) -> None:
    """What a mesh gathers of weights: nothing; a layer at a time; or, under ZeRO-1, each weight once."""
    blocks = jax.tree.leaves({name: part for name, part in params.items() if "blocks" in name})
    stacks = [_sides(leaf.shape) for leaf in blocks if leaf.shape[0] > 1]
    gathers = [one for one in found.collectives if one.kind == "all-gather"]
    whole = [one for one in gathers if any(_sides(dims(shape)) in stacks for shape in one.arrays)]
    assert [one for one in whole if mesh != "zero1" or one.count > 1] == [], "the stack of all layers is gathered"
    if mesh in ("one", "data"):
        assert [one for one in gathers if one.size > vectors * len(one.group)] == [], "weights are gathered"
    if mesh == "one":
        assert found.collectives == ()


def _sides(shape) -> list[int]:
    return [n for n in shape if n > 1]


def dims(shape: str) -> list[int]:
    """The sides in f32[5,256]."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape).group(1).split(",") if n]


def in_float32(text: str, *, rows: set[int], tpu: bool) -> list[str]:
    """Products of activations, by their names in the model, that run in float32 and are not meant to.

    A TPU shortens all operands, and the type of the result tells; a GPU sums in float32, and the types of the operands tell.
    """
    found = []
    for one, shapes in products(text):
        operands = [shapes.get(name, "") for name in one.operands[:2]]
        tells = [one.result.strip("(")] if tpu else operands
        touched = {n for shape in [one.result, *operands] if "[" in shape for n in dims(shape)}
        by_input = tpu and re.search(SUMMED, hlo.source_of(one)) and set(dims(one.result)) & rows
        if touched & rows and not by_input and all(shape.startswith("f32") for shape in tells):
            found.append(hlo.source_of(one))
    return [name for name in found if not re.search(FLOAT32, name)]


def products(text: str):
    """(instruction, results of its computation by name) of every product, those of CUDA's libraries among them."""
    _, found = hlo.computations(text)
    for body in found.values():
        results = {one.name: one.result for one in body}
        for one in body:
            library = re.search(r'custom_call_target="(__cublas|__cudnn\$conv)', one.rest)
            if one.opcode in ("dot", "convolution") or library:
                yield one, results


def linear_maps(text: str) -> set[str]:
    """Which of a block's linear maps have products in the program."""
    names = {hlo.source_of(one) for one, _ in products(text)}
    return {name for name in ("modulation", "qkv", "proj", "gate_up", "down") if any(f"/{name}/" in one for one in names)}


def pixels(whole: config.Config, images: int) -> int:
    """Bytes of finished images."""
    return images * math.prod(whole.model.image_size) * 3
