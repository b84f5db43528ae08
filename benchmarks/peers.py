"""DiP beside the public PyTorch PixNerd at equal width, depth, image size and batch, in turns, in one process, float32, CPU.

    python benchmarks/peers.py --pixnerd=PIXNERD_CHECKOUT [--compile] [--rounds=5]

Needs PyTorch and a checkout of https://github.com/MCG-NJU/PixNerd. Both have `depth` DiT blocks of `width`; DiP's head is the
U-Net at base width 64, PixNerd's its published decoder (4 NeRF blocks of width 64, ratio 2). Weights are random: speed does not
depend on them. `both` is the gradient of a mean square by all parameters.
"""

import argparse
import importlib.util
import os
import pathlib

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait would count as work

import checkouts

checkouts.require_packages("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import measuring  # noqa: E402
import torch  # noqa: E402

HEADS = 6
NERF_BLOCKS = 4
PIXNERD = "src/models/transformer/pixnerd_c2i.py"


def ours(options: argparse.Namespace) -> dict:
    fields = {"depth": options.depth, "width": options.width, "num_heads": HEADS, "remat": options.remat, "head_remat": False}
    fields |= {"scan_layers": False}  # as every config for CPUs here has it
    model = measuring.make_model("S", options.image_size, {}, **fields, head_zero_init=False)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (options.batch, options.image_size, options.image_size, 3))
    t, y = jnp.full((options.batch,), 0.5), jnp.zeros((options.batch,), jnp.int32)

    def loss(params, x, t, y):
        return jnp.mean(jnp.square(model.apply(params, x, t, y) - x))

    functions = {"forward": model.apply, "both": jax.value_and_grad(loss)}
    compiled = {kind: jax.jit(functions[kind]).lower(params, x, t, y).compile() for kind in options.kinds}
    return {("dip", kind): lambda call=call: call(params, x, t, y) for kind, call in compiled.items()}


def theirs(options: argparse.Namespace) -> dict:
    path = options.pixnerd / PIXNERD
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    network = module.PixNerDiT(
        in_channels=3,
        num_groups=HEADS,
        hidden_size=options.width,
        hidden_size_x=64,
        nerf_mlpratio=2,
        num_blocks=options.depth + NERF_BLOCKS,
        num_cond_blocks=options.depth,
        patch_size=16,
        num_classes=1000,
    )
    x = torch.randn(options.batch, 3, options.image_size, options.image_size)
    t, y = torch.full((options.batch,), 0.5), torch.zeros(options.batch, dtype=torch.long)

    def calls(network) -> tuple:
        def forward():
            with torch.no_grad():
                network(x, t, y)

        def both():
            network.zero_grad(set_to_none=True)
            torch.mean(torch.square(network(x, t, y) - x)).backward()

        return forward, both

    forward, both = calls(network)
    eager = {"forward": forward, "both": both}
    table = {("pixnerd", kind): eager[kind] for kind in options.kinds}
    if options.compile and "forward" in options.kinds:
        table["pixnerd compiled", "forward"] = calls(torch.compile(network))[0]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixnerd", type=pathlib.Path, required=True)
    parser.add_argument("--compile", action="store_true", help="PixNerd's forward under torch.compile too")
    for name, default in (("width", 384), ("depth", 12), ("image_size", 256), ("batch", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--remat", default="dots", help="DiP's `model.remat`")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=["forward", "both"])
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    checkouts.require("pixnerd", options.pixnerd, of="MCG-NJU/PixNerd", files=[PIXNERD])
    with measuring.one_device():
        times = measuring.interleave(ours(options) | theirs(options), rounds=options.rounds)
    rows = [
        {"who": who, "kind": kind, **timing, "dip_speed": timing["seconds"] / times["dip", kind]["seconds"]}
        for (who, kind), timing in times.items()
    ]
    header = ("who", "kind", "seconds", "low", "high", "wall", "DiP times as fast")
    lines = [
        [row["who"], row["kind"], *(row[key] for key in ("seconds", "low", "high", "wall_seconds", "dip_speed"))]
        for row in rows
    ]
    print(measuring.table(header, lines))
    config = measuring.asked(options, without=("pixnerd",))
    measuring.save("peers", config, rows, out=options.out)


if __name__ == "__main__":
    main()
