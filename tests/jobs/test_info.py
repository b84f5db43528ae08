"""`info` and the cost model: counts that a reader can check, FLOPs against XLA's own, memory per device by arithmetic."""

import importlib.util
import json

import jax
import pytest
from places import ROOT
from small_models import COMBINATIONS, small
from traced import products

from dip_jax import __main__, config
from dip_jax.errors import UserError
from dip_jax.jobs import info
from dip_jax.models import cost, folding
from dip_jax.models.detailers import HEADS
from dip_jax.runtime import sharding
from dip_jax.training import workload

CONFIGS = ROOT / "configs"


def load(name: str, *arg: str) -> config.Config:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config.from_config_dict(module.get_config(*arg))


def test_the_command_prints_the_paper_count_as_json(capsys):
    assert __main__.main(["info", f"--config={CONFIGS / 'dip.py'}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == 631_989_411
    assert facts["parameters"]["head"] == 6_968_067
    assert round(100 * facts["parameters"]["growth_over_dit_only"], 3) == 0.545
    assert facts["bytes_per_device"]["params"] == 4 * (631_989_411 + facts["repa"]["projector_parameters"])
    assert facts["flops_per_image"]["blocks"] == pytest.approx(221e9, rel=0.01)
    assert facts["flops_per_image"]["head"] == pytest.approx(20e9, rel=0.15)


def test_the_command_prints_tables(capsys):
    assert __main__.main(["info", f"--config={CONFIGS / 'demo.py'}"]) == 0
    text = capsys.readouterr().out
    for part in ("| head/down_0/kernel", "GFLOP per image", "activations", "GiB", "over DiT-only"):
        assert part in text


ROWS = {
    ("dip", "512"): 634_643_619,
    ("dip", "none"): 628_563_360,
    ("dip", "coord_mlp,256"): 700_589_219,
    ("table1_600_epochs",): 631_989_411,
    ("table2_dit_26x1152",): 628_563_360,
    ("table2_dit_32x1152",): 771_953_664,
    ("table2_dit_26x1280",): 775_539_008,
    ("table2_dit_26x1536",): 1_115_891_328,
    ("table2_mlp",): 630_184_992,
    ("table2_attention",): 629_892_899,
    ("table2_coord_mlp",): 700_589_219,
    ("table2_unet",): 631_989_411,
    ("table3_dip_xl_32",): 634_643_619,
    ("figure5_post_hoc",): 631_989_411,
    ("figure10a", "4x64"): 631_989_411,
    ("figure10b", "16,512,none"): 628_563_360,
}


@pytest.mark.parametrize("row", ROWS, ids=":".join)
def test_each_row_of_the_paper_has_a_config_of_its_size(row):
    total = info.describe(load(*row), mesh=config.Mesh(data=8))["parameters"]["total"]
    assert total == ROWS[row]


@pytest.mark.parametrize(("file", "arg"), [("dip", "512,hybird"), ("figure10a", "4"), ("figure10b", "16")])
def test_a_bad_argument_of_a_config_is_one_line(file, arg):
    with pytest.raises(ValueError, match=arg):
        load(file, arg)


def test_every_head_has_a_cost():
    assert set(cost.HEAD_PRODUCTS) == set(HEADS)


@pytest.mark.parametrize(("head", "place"), COMBINATIONS)
def test_flops_are_those_of_the_traced_products(head, place, monkeypatch):
    """Against the products in the jaxpr itself, layers unrolled: what one more image costs, kernels composed beforehand."""
    monkeypatch.setattr(folding, "composes", lambda *sizes, patches: True)
    model = small(head=head, placement=place, width=64, scan_layers=False, image_size=(32, 32), head_depth=None)
    h, w = model.config.image_size
    params = jax.eval_shape(model.init, jax.random.key(0))

    def traced(n: int) -> int:
        args = (jax.ShapeDtypeStruct((n, h, w, 3), "float32"), jax.ShapeDtypeStruct((n,), "float32"))
        apply = lambda *operands: model.apply(*operands)  # noqa: E731 (its own trace)
        return products(jax.make_jaxpr(apply)(params, *args, jax.ShapeDtypeStruct((n,), "int32")).jaxpr)

    parts = cost.forward_flops(model.config)
    assert {part for part, count in parts.items() if count} == params.keys()
    assert sum(parts.values()) == pytest.approx(traced(3) - traced(2), rel=1e-9)


def test_activation_bytes_are_those_of_an_accelerator(monkeypatch):
    """On a CPU the head runs in groups of patches that would each keep their own merged kernels."""
    model = small(head="unet", head_remat=False)
    expected = cost.activation_bytes_per_image(model)
    monkeypatch.setattr(folding, "GROUP_BYTES", 2 * 2 * model.config.patch_size**2 * (model.config.head_width or 64) * 4)
    with jax.set_mesh(sharding.make_mesh(config.Mesh())):
        groups = [folding.count_groups(model.config, images=images, patches=2) for images in (2, 3)]
        assert groups == [1, 2]  # the two batches that are compared would not be the same program
        assert cost.activation_bytes_per_image(model) == expected


def test_activations_follow_the_rematerialisation():
    sizes = [cost.activation_bytes_per_image(small(depth=4, head="none", remat=remat)) for remat in ("none", "dots", "full")]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2] > 0
    n, d, layers = 2, 32, 4
    assert sizes[2] >= 4 * n * d * layers  # at least the tokens between blocks


def test_workspace_is_what_the_backward_pass_makes_again():
    kept = cost.recomputed_bytes_per_image(small(depth=4, head="unet"))  # nothing is made again
    assert kept == {"head": 0, "block": 0}
    again = cost.recomputed_bytes_per_image(small(depth=4, head="unet", remat="full", head_remat=True))
    n, d = 2, 32
    assert again["block"] >= 4 * n * (3 + 8 / 3 * 2) * d  # queries, keys, values and both halves of SwiGLU at the least
    pixels, width = 16 * 8, 8
    assert again["head"] >= 4 * pixels * width
    deeper = cost.recomputed_bytes_per_image(small(depth=6, head="unet", remat="full", head_remat=True))
    assert deeper == again  # of one block


def test_what_a_head_after_the_blocks_keeps_is_gone_in_their_turn():
    def workspace(**fields):
        model = small(depth=4, head="unet", remat="full", **fields)
        return workload._workspace(model, params=0, gradients=0, images=8)

    made = cost.recomputed_bytes_per_image(small(depth=4, head="unet", remat="full", head_remat=True))
    assert workspace(head_remat=True) == max(5 * made["head"], 16 * made["block"])
    assert workspace(head_remat=False) == max(16 * made["block"] - 8 * made["head"], 0)
    assert workspace(head_remat=False, placement="residual") == workspace(head_remat=False)
    assert workspace(head_remat=False, placement="intermediate") == 16 * made["block"]


# What the compilers say that a device needs for DiP-XL with REPA, 256 images in all, GiB (benchmarks/topologies.py).
SAID = [
    ("256", config.Mesh(data=16), 15.62),  # v5e-16
    ("512", config.Mesh(data=16), 17.36),
    ("512", config.Mesh(data=16, zero1=True), 12.53),
    ("256", config.Mesh(data=8), 19.76),  # v6e-8
    ("512", config.Mesh(data=8), 24.35),
    ("256", config.Mesh(data=8), 20.22),  # h100x8
    ("512", config.Mesh(data=8), 28.89),
    ("256", config.Mesh(data=32), 13.94),  # v5p-64
    ("512", config.Mesh(data=32), 15.13),
    ("256", config.Mesh(data=128), 12.62),  # v5p-256
    ("512", config.Mesh(data=128), 12.94),
    ("256", config.Mesh(data=64), 13.17),  # h100x64
    ("512", config.Mesh(data=64), 13.85),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "mesh", "said"), SAID)
def test_the_estimate_is_near_what_compilers_said(size, mesh, said):
    estimate = info.describe(load("dip", size), mesh=mesh)["bytes_per_device"]["total"] / 2**30
    assert estimate == pytest.approx(said, rel=0.1)


def test_the_difference_to_the_compiler_is_told():
    assert info.difference(9 * 2**30, 10 * 2**30) == (
        "the estimate from shapes, 9.00 GiB, is 10% below what this compiler needs, 10.00 GiB"
    )
    assert "10% above" in info.difference(11 * 2**30, 10 * 2**30)


@pytest.mark.slow
def test_memory_is_divided_by_the_mesh():
    base = load("dip")
    alone, fsdp, zero = (
        info.describe(base, mesh=mesh)["bytes_per_device"]
        for mesh in (config.Mesh(data=1), config.Mesh(data=1, fsdp=8), config.Mesh(data=8, zero1=True))
    )
    assert alone["optimizer"] == pytest.approx(2 * alone["params"], rel=1e-6)
    assert fsdp["params"] == pytest.approx(alone["params"] / 8, rel=0.1)  # the head is replicated
    assert zero["params"] == alone["params"] and zero["ema"] < 0.2 * alone["ema"]
    assert fsdp["activations"] * 8 == alone["activations"]


def test_a_mesh_that_does_not_fit_is_refused():
    base = load("dip")
    with pytest.raises(UserError, match=r"data.batch_size=256 is not divisible by the 7 parts"):
        info.describe(base, mesh=config.Mesh(data=7))
    for text in ("data", "data:x", "rows:2", "data:0", "data:8,fsdp:0", "data:-1", "data:²"):
        with pytest.raises(UserError, match="is not AXIS:SIZE"):
            info.read_mesh(text)
    assert info.read_mesh("data:8,fsdp:4") == config.Mesh(data=8, fsdp=4)
