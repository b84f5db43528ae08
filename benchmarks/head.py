"""The U-Net head alone: forward, and forward + backward, in every formulation.

    python benchmarks/head.py [--width=64] [--batch=1] [--dtype=float32] [--rounds=5]      minutes on two CPU cores
    python benchmarks/head.py --batch=64 --dtype=bfloat16 --rounds=20                      one call on a GPU

    naive    the plain definition (`tests/support/plain_unet.py`), vmapped over the patches
    folded   `models/folding.py`, patches in the batch: what runs on accelerators
    grouped  folded, in groups of patches where they are many: what runs on a CPU
    remat    folded, its activations made again in the backward pass
    convs    folded, but the 1x1 and 2x2 levels as convolutions instead of dense products
    dense4   folded, dense products up to 4x4
    plain    folded, but no kernel composed: transposed convolutions first

All have the same parameters and inputs and run in turn. `difference` is the largest one from the first, relative to the largest
value: of the output, of the gradients. FLOPs are those of the folded head by formula (`cost`) and, of each, by XLA.
"""

import argparse
import dataclasses
import pathlib
import sys

import measuring

sys.path.append(str(measuring.ROOT / "tests" / "support"))

import jax
import jax.numpy as jnp
from plain_unet import plain_unet

from dip_jax.models import cost, folding
from dip_jax.models.detailers import UNet, unet_depth
from dip_jax.models.dip import build
from dip_jax.models.placement import MappedHead

DENSE = {"convs": 0, "dense4": 4}
NAMES = ("naive", "folded", "grouped", "remat", *DENSE, "plain")


def over_patches(head):
    images, patches = folding.AXES
    return jax.vmap(jax.vmap(head, (None, 0, 0, None), axis_name=patches), (None, 0, 0, 0), axis_name=images)


def formulation(name: str, model):
    """(params, p [B, N, P, P, 3], s [B, N, D], t_emb [B, D]) -> [B, N, P, P, 3], and how far products are dense in it."""
    if name == "naive":
        return over_patches(lambda params, p, s, t: plain_unet(params, p.astype(s.dtype), s, t, depth=unet_depth(model.config)))
    if name == "grouped":
        config = dataclasses.replace(model.config, head_remat=False)
        return lambda params, p, s, t: MappedHead(config).apply({"params": params}, p, s, t)

    def head(params, p, s, t):
        before = folding.DENSE_SIDE, folding.composes
        folding.DENSE_SIDE = DENSE.get(name, folding.DENSE_SIDE)
        if name == "plain":
            folding.composes = lambda *sizes, patches: False
        try:
            return UNet(model.config).apply({"params": params}, p, s, t)
        finally:
            folding.DENSE_SIDE, folding.composes = before

    return over_patches(jax.checkpoint(head) if name == "remat" else head)


def difference(tree, reference) -> float:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def measure(options: argparse.Namespace) -> list[dict]:
    model = build(
        f"DiP-{options.size}/{options.patch_size}",
        image_size=options.image_size,
        head_width=options.width,
        dtype=options.dtype,
    )
    patches = (options.image_size // options.patch_size) ** 2
    keys = jax.random.split(jax.random.key(0), 4)
    p = jax.random.normal(keys[0], (options.batch, patches, options.patch_size, options.patch_size, 3))
    s = jax.random.normal(keys[1], (options.batch, patches, model.config.width)).astype(options.dtype)
    t = jnp.zeros((options.batch, model.config.width))
    params = jax.jit(model.init)(keys[2])["head"]
    weights = jax.random.normal(keys[3], p.shape)
    built, outputs = {}, {}
    for name in options.only:
        apply = formulation(name, model)

        def loss(params, s, apply=apply):
            return jnp.mean(weights * apply(params, p, s, t).astype(jnp.float32))

        for kind, function, operands in (
            ("forward", apply, (params, p, s, t)),
            ("both", jax.value_and_grad(loss, (0, 1)), (params, s)),
        ):
            if kind not in options.kinds:
                continue
            case = measuring.build(function, *operands)
            built[name, kind] = (case, operands)
            outputs[name, kind] = case.call(*operands)
            print(f"compiled {name} {kind} in {case.cold:.0f} s", file=sys.stderr, flush=True)
    times = measuring.interleave(
        {key: lambda case=case, operands=operands: case.call(*operands) for key, (case, operands) in built.items()},
        rounds=options.rounds,
    )
    flops = options.batch * cost.forward_flops(model.config)["head"]
    rows = []
    for (name, kind), (case, _) in built.items():
        speed = times["naive", kind]["seconds"] / times[name, kind]["seconds"] if "naive" in options.only else None
        count = flops * (1 if kind == "forward" else 3)
        rows.append(
            {"formulation": name, "kind": kind, **times[name, kind], "times_naive": speed}
            | {"flops": count, "xla_flops": case.xla_flops, "flops_per_second": count / times[name, kind]["seconds"]}
            | {"temp_bytes": case.temp_bytes, "compile_seconds": case.cold, "compile_cached_seconds": case.warm}
            | {"difference": difference(outputs[name, kind], outputs[options.only[0], kind])}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL", help="backbone whose width the feature has")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for name, default in (("width", 64), ("batch", 1), ("image_size", 256), ("patch_size", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("only", NAMES), ("kinds", ("forward", "both"))):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=list(default), help="some of %(default)s")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with measuring.one_device():
        rows = measure(options)
    header = ("formulation", "kind", "seconds", "low", "high", "times_naive", "GFLOP", "XLA GFLOP", "temp MiB", "difference")
    lines = [
        [row["formulation"], row["kind"], row["seconds"], row["low"], row["high"], row["times_naive"]]
        + [row["flops"] / 1e9, row["xla_flops"] / 1e9, row["temp_bytes"] / 2**20, row["difference"]]
        for row in rows
    ]
    print(measuring.table(header, lines))
    measuring.save("head", measuring.asked(options), rows, out=options.out)


if __name__ == "__main__":
    main()
