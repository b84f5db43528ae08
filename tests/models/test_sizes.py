"""Every published size, by name, shape and logical axes, without allocating it: `jax.eval_shape` only."""

import math

import jax
import pytest
from places import GOLDEN

from dip_jax.models.dip import build
from dip_jax.runtime import sharding

REVIEWED = GOLDEN / "parameters"

TREES = {
    **{f"DiP-{size}-16": {"name": f"DiP-{size}/16"} for size in ("tiny", "S", "B", "L", "XL")},
    **{f"DiP-XL-16-{head}": {"head": head} for head in ("mlp", "coord_mlp", "attention", "none")},
    **{f"DiP-XL-16-unet-{placement}": {"placement": placement} for placement in ("intermediate", "hybrid")},
    "DiP-XL-32": {"name": "DiP-XL/32", "image_size": 512},
}

# The rows of Tables 2 and 3. The paper prints 631M for XL/32 too; its patch embedding alone is 2.7M larger than that of XL/16.
COUNTS = {
    "26 x 1152": ({"name": "DiT-XL/16"}, 628_563_360),
    "32 x 1152": ({"name": "DiT-XL/16", "depth": 32}, 771_953_664),
    "26 x 1280": ({"name": "DiT-XL/16", "width": 1280}, 775_539_008),
    "26 x 1536": ({"name": "DiT-XL/16", "width": 1536}, 1_115_891_328),
    "MLP": ({"head": "mlp"}, 630_184_992),
    "attention, 2 blocks": ({"head": "attention"}, 629_892_899),
    "attention, 3 blocks": ({"head": "attention", "head_depth": 3}, 629_958_883),
    "coordinate MLP": ({"head": "coord_mlp"}, 700_589_219),
    "U-Net": ({}, 631_989_411),
    "U-Net, 512": ({"name": "DiP-XL/32", "image_size": 512}, 634_643_619),
    "U-Net, large": ({"name": "DiP-L/16"}, 425_424_387),
}


def shapes(**model):
    return jax.eval_shape(build(**model).init, jax.random.key(0))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def describe(**model) -> str:
    """One line per parameter: name, dtype and shape, logical axes."""
    axes = build(**model).logical_axes()
    tree = jax.tree.map(lambda leaf, names: (leaf, names), shapes(**model), axes)
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, tuple))
    lines = []
    for path, (leaf, names) in flat:
        sharding.spec(names)  # raises for a name without a rule
        assert len(names) == len(leaf.shape), path
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lines.append(f"{name}  {leaf.dtype}{list(leaf.shape)}  ({', '.join(map(str, names))})")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("row", COUNTS)
def test_parameter_counts_are_those_of_the_paper(row):
    model, expected = COUNTS[row]
    assert count(shapes(**model)) == expected


def test_the_head_adds_half_a_percent():
    tree = shapes()
    assert count(tree["head"]) == 6_968_067
    growth = count(tree) / count(shapes(head="none")) - 1
    assert round(100 * growth, 3) == 0.545


@pytest.mark.parametrize("name", TREES)
def test_parameter_tree_is_the_reviewed_one(name, update_goldens):
    """Refresh with --update-goldens where a rename is meant: it makes older checkpoints unreadable."""
    file = REVIEWED / f"{name}.txt"
    if update_goldens:
        file.parent.mkdir(exist_ok=True)
        file.write_text(describe(**TREES[name]))
    assert describe(**TREES[name]) == file.read_text(), "run pytest --update-goldens if this change of the tree is meant"


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [16, 128])
def test_unet_depth_and_width_sweep(depth, width):
    """Figure 10(a): the parameters of the plain U-Net, counted by hand."""
    d, widths = 1152, [width * 2**i for i in range(depth)]
    expected = sum(9 * a * b + b for a, b in zip([3, *widths], widths, strict=False))
    expected += (widths[-1] + d + 1) * widths[-1]
    expected += sum(9 * 2 * b * a + a for a, b in zip([width, *widths], widths, strict=False))
    expected += sum(4 * w * w + w for w in widths)
    expected += 3 * width + 3
    assert count(shapes(head_depth=depth, head_width=width)["head"]) == expected


@pytest.mark.parametrize(("patch_size", "image_size"), [(8, 256), (16, 512), (32, 512), (16, (256, 384)), (32, (512, 256))])
def test_patch_sizes_and_shapes_of_figure_10b(patch_size, image_size):
    model = build(f"DiP-XL/{patch_size}", image_size=image_size)
    h, w = model.config.image_size
    x = jax.ShapeDtypeStruct((1, h, w, 3), "float32")
    t, y = jax.ShapeDtypeStruct((1,), "float32"), jax.ShapeDtypeStruct((1,), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.eval_shape(model.apply, params, x, t, y).shape == x.shape
    assert jax.eval_shape(model.features, params, x, t, y).shape == (1, h * w // patch_size**2, 1152)
