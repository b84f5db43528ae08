"""How far bfloat16 takes output and gradient from the exact ones, for every head, and PyTorch's autocast beside it.

    python benchmarks/half_precision.py [--pixnerd=PIXNERD_CHECKOUT] [--out=FILE.json]

A network 96 wide of three blocks, 64 px, batch 8, random weights (`tests/support/rounding_cases.py`), on a CPU: relative L2 of
the output, of the whole gradient of a mean square, and of the worst and the median tensor of it, float32 being exact. With a
checkout of https://github.com/MCG-NJU/PixNerd and PyTorch its network runs with the weights of our coordinate MLP: in float32,
under autocast, and wholly in bfloat16, against float64.
"""

import argparse
import importlib.util
import pathlib
import sys

import checkouts
import jax
import measuring
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import rounding_cases as case  # noqa: E402

from dip_jax.checkpoints import torch_names  # noqa: E402
from dip_jax.models.detailers import HEADS  # noqa: E402

PIXNERD = "src/models/transformer/pixnerd_c2i.py"
KEYS = ("output", "gradient", "worst", "median")


def ours(head: str) -> dict[str, float]:
    exact = case.model(head, "float32")
    params, given = case.weights(exact), case.inputs(exact)
    (output, gradients), (rough, found) = (
        case.run(case.model(head, dtype), params, given) for dtype in ("float32", "bfloat16")
    )
    return {"output": case.error(rough, output)} | case.errors(found, gradients)


def theirs(checkout: pathlib.Path) -> list[dict]:
    """PixNerd's own network with the weights of `ours("coord_mlp")`."""
    import torch

    spec = importlib.util.spec_from_file_location("pixnerd", checkout / PIXNERD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = case.model("coord_mlp", "float32")
    tensors = torch_names.to_tensors(case.weights(model), model.config)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in dict(tensors).items()}
    x, t, y, v = case.inputs(model)
    sizes = {"num_groups": case.SIZES["num_heads"], "hidden_size": case.SIZES["width"], "patch_size": case.SIZES["patch_size"]}
    blocks = {"num_cond_blocks": case.SIZES["depth"], "num_blocks": case.SIZES["depth"] + 4, "hidden_size_x": 64}

    def exact_norm(norm, x):
        return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    def run(dtype, autocast: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        network = module.PixNerDiT(in_channels=3, nerf_mlpratio=2, num_classes=case.SIZES["num_classes"], **sizes, **blocks)
        network.load_state_dict(tensors, strict=True)
        network = network.to(dtype)
        network.t_embedder.mlp.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
        images, target = (torch.from_numpy(part.transpose(0, 3, 1, 2).copy()) for part in (x, v))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = network(images.to(dtype), torch.from_numpy(t).to(dtype), torch.from_numpy(y).long())
        wide = torch.promote_types(output.dtype, torch.float32)
        torch.mean(torch.square(output.to(wide) - target.to(wide))).backward()
        return output.detach().double().numpy(), {n: p.grad.double().numpy() for n, p in network.named_parameters()}

    published, module.RMSNorm.forward = module.RMSNorm.forward, exact_norm
    output, gradients = run(torch.float64)
    module.RMSNorm.forward = published
    rows = []
    ways = {"float32": (torch.float32,), "autocast": (torch.float32, True), "bfloat16": (torch.bfloat16,)}
    for name, way in ways.items():
        rough, found = run(*way)
        rows.append({"who": f"PixNerd, {name}", "output": case.error(rough, output)} | case.errors(found, gradients))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixnerd", type=pathlib.Path, help="checkout of MCG-NJU/PixNerd")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.pixnerd:
        checkouts.require_packages("torch")
        checkouts.require("pixnerd", options.pixnerd, of="MCG-NJU/PixNerd", files=[PIXNERD])
    rows = [{"who": f"ours, {head}"} | ours(head) for head in HEADS] + (theirs(options.pixnerd) if options.pixnerd else [])
    print(measuring.table(("who", *KEYS), [[row["who"], *(f"{row[key]:.1e}" for key in KEYS)] for row in rows]))
    config = measuring.asked(options, without=("pixnerd",)) | {"platform": jax.default_backend(), **case.SIZES}
    measuring.save("half_precision", config, rows, out=options.out)


if __name__ == "__main__":
    main()
