"""What each Patch Detailer Head costs against DiT-only: time and memory of forward and forward + backward (Table 2).

    python benchmarks/heads_cost.py [--size=XL] [--heads=none,unet] [--rounds=3]
    python benchmarks/heads_cost.py --rounds=0      FLOPs and saved activations only: seconds on any machine

All variants share one backbone's weights and run in turn, round after round, so that a busy machine disturbs all alike; a time
is the median of the process's CPU seconds, on a GPU of wall seconds. Memory is what XLA allocates beside parameters, gradients
and inputs, from the compiled program. Heads are not rematerialised here: the paper does not mention it, and it would hide their
memory.
"""

import argparse
import dataclasses
import functools
import pathlib
import platform
import sys

import jax
import jax.numpy as jnp
import measuring

from dip_jax.models import cost, starting
from dip_jax.models.dip import build

HEADS = ("none", "mlp", "attention", "coord_mlp", "unet")
# Table 2: training cost in 8 x GPU hours, latency in seconds, GPU not named.
PAPER = {"none": (84, 0.88), "mlp": (93, 0.91), "attention": (96, 0.94), "coord_mlp": (123, 0.95), "unet": (92, 0.92)}


@dataclasses.dataclass(frozen=True)
class Variant:
    params: dict
    forward: jax.stages.Compiled
    train: jax.stages.Compiled


def compile_variant(head: str, size: str, batch: int, backbone: dict) -> Variant:
    dtype = "float32" if measuring.on_cpu() else "bfloat16"
    model = build(f"DiP-{size}/16", head=head, dtype=dtype, head_remat=False, head_zero_init=False)
    params = jax.jit(model.init)(jax.random.key(0))
    if backbone:
        origin = starting.Origin(dataclasses.replace(model.config, head="none"), backbone)
        params = starting.begin(params, origin, model=model.config, classes=())[0]
    x, t, y = inputs(batch)

    def loss(params, x, t, y):
        return jnp.mean(jnp.square(model.apply(params, x, t, y) - x))

    forward = jax.jit(model.apply).lower(params, x, t, y).compile()
    train = jax.jit(jax.value_and_grad(loss)).lower(params, x, t, y).compile()
    return Variant(params, forward, train)


def inputs(batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (batch, 256, 256, 3))
    return x, jnp.full((batch,), 0.5), jnp.zeros((batch,), jnp.int32)


def measure(heads: list[str], size: str, batch: int, rounds: int) -> dict:
    variants: dict[str, Variant] = {}
    for head in heads:
        shared = variants["none"].params if variants else {}
        variants[head] = compile_variant(head, size, batch, shared)
        print(f"compiled {head}", file=sys.stderr, flush=True)
    operands = inputs(batch)
    calls = {
        f"{head} {kind}": functools.partial(getattr(variant, kind), variant.params, *operands)
        for head, variant in variants.items()
        for kind in ("forward", "train")
    }
    times = measuring.interleave(calls, rounds=rounds)
    keys = ("seconds", "low", "high")
    rows = {}
    for head, variant in variants.items():
        both = {kind: times[f"{head} {kind}"] for kind in ("forward", "train")}
        rows[head] = {f"{kind}_{key}": taken[key] for kind, taken in both.items() for key in keys}
        rows[head] |= {
            "forward_bytes": variant.forward.memory_analysis().temp_size_in_bytes,
            "train_bytes": variant.train.memory_analysis().temp_size_in_bytes,
        }
    device = jax.devices()[0]
    return {
        "model": f"DiP-{size}/16, 256 x 256, batch {batch}",
        "device": f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}",
        "clock": "process CPU seconds" if measuring.on_cpu() else "wall seconds",
        "rounds": rounds,
        "rows": rows,
    }


def plan(heads: list[str], size: str) -> dict:
    """What needs no run: forward FLOPs and activations kept for the backward pass, per image, bfloat16, nothing recomputed."""
    rows = {}
    for head in heads:
        model = build(f"DiP-{size}/16", head=head, remat="none", head_remat=False)
        flops = cost.forward_flops(model.config)
        saved = cost.activation_bytes_per_image(model)
        rows[head] = {"flops": sum(flops.values()), "head_flops": flops["head"], "saved_bytes": saved}
    return {"model": f"DiP-{size}/16, 256 x 256", "rows": rows}


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def plan_lines(facts: dict) -> list[str]:
    rows, base = facts["rows"], facts["rows"]["none"]
    header = ["head", "forward GFLOP", "ratio", "of which head", "saved activations MiB", "ratio", "over DiT-only MiB"]
    cells = [
        [
            head,
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops'] / base['flops']:.3f}",
            f"{row['head_flops'] / 1e9:.1f}",
            f"{row['saved_bytes'] / 2**20:.0f}",
            f"{row['saved_bytes'] / base['saved_bytes']:.3f}",
            f"{(row['saved_bytes'] - base['saved_bytes']) / 2**20:.0f}",
        ]
        for head, row in rows.items()
    ]
    lines = [
        "## By arithmetic",
        "",
        f"{facts['model']}, per image, bfloat16, nothing recomputed; ratios to DiT-only.",
        "",
        *table(header, cells),
        "",
    ]
    if {"attention", "unet"} <= {*rows}:
        twice = rows["attention"]["saved_bytes"] / rows["unet"]["saved_bytes"]
        lines += [
            f"A training step with the attention head keeps {twice:.2f} times what the U-Net keeps (the paper: about twice).",
            "",
        ]
    return lines


def measured_lines(facts: dict) -> list[str]:
    rows, base = facts["rows"], facts["rows"]["none"]
    header = ["head", "forward s", "ratio", "paper latency", "fwd+bwd s", "ratio", "paper training"]
    header += ["forward MiB", "fwd+bwd MiB"]
    cells = []
    for head, row in rows.items():
        training, latency = (value / reference for value, reference in zip(PAPER[head], PAPER["none"], strict=True))
        cells.append(
            [
                head,
                f"{row['forward_seconds']:.2f}",
                f"{row['forward_seconds'] / base['forward_seconds']:.3f}",
                f"{latency:.3f}",
                f"{row['train_seconds']:.2f}",
                f"{row['train_seconds'] / base['train_seconds']:.3f}",
                f"{training:.3f}",
                f"{row['forward_bytes'] / 2**20:.0f}",
                f"{row['train_bytes'] / 2**20:.0f}",
            ]
        )
    lines = [
        "## Measured",
        "",
        f"{facts['model']}; {facts['device']}; median {facts['clock']} of {facts['rounds']} interleaved rounds.",
        "Ratios to DiT-only; the paper's are those of its Table 2 (GPU not named). Memory: what XLA allocates beside",
        "parameters and gradients.",
        "",
        *table(header, cells),
        "",
    ]
    if {"coord_mlp", "unet"} <= {*rows}:
        slower = rows["coord_mlp"]["train_seconds"] / rows["unet"]["train_seconds"]
        lines += [f"The coordinate MLP's training step takes {slower:.2f} times the U-Net's (the paper: 123 / 92 = 1.34).", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL", help="row of config.SIZES")
    parser.add_argument("--heads", default=",".join(HEADS), help="some of them, none first")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; its table goes beside it, as .md")
    arguments = parser.parse_args()
    heads = arguments.heads.split(",")
    if heads[0] != "none" or not {*heads} <= {*HEADS}:
        parser.error(f"--heads={arguments.heads}: none, then some of {', '.join(HEADS[1:])}")
    facts = {"plan": plan(heads, arguments.size)}
    lines = ["# Cost of each head against DiT-only (Table 2)", "", *plan_lines(facts["plan"])]
    if arguments.rounds:
        with measuring.one_device():
            facts["measured"] = measure(heads, arguments.size, arguments.batch, arguments.rounds)
        lines += measured_lines(facts["measured"])
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    what = f"heads_{'cost' if arguments.rounds else 'plan'}_{arguments.size}"
    asked = {key: str(value) for key, value in vars(arguments).items() if key != "out"}
    measuring.save(what, asked, facts, out=arguments.out).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
