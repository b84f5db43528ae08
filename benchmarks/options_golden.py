"""Runs the published code of the objective's options on random arrays and records it as tests/golden/options.npz.

    python benchmarks/options_golden.py --deco=DIR --internal-guidance=DIR --pixelrepa=DIR --lakonlab=DIR [--record]

Needs PyTorch (a CPU is enough) and checkouts of the repositories. Without --record, what comes out is compared.
"""

import argparse
import importlib.util
import pathlib
import re
import sys
import types
from collections.abc import Callable
from unittest import mock

import checkouts
import numpy as np

checkouts.require_packages("torch", "einops")

import torch  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import options_cases as case  # noqa: E402

NEEDED = {
    "deco": ("Zehong-Ma/DeCo", ["src/diffusion/flow_matching/training_repa_DeCo.py"]),
    "internal_guidance": ("CVL-UESTC/Internal-Guidance", ["SiT/loss.py", "SiT/samplers.py", "SiT/train.py"]),
    "pixelrepa": ("kaist-cvml/PixelREPA", ["model_pixelREPA.py", "util/model_util.py"]),
    "lakonlab": ("Lakonik/LakonLab", ["lakonlab/models/architectures/asymflow/common.py"]),
}


def plainly(function: Callable | None = None, **options: object) -> Callable:
    """Stands for `torch.compile`, bare or called: the function itself."""
    return function or plainly


def load(path: pathlib.Path, **stubs: dict) -> types.ModuleType:
    """A file of theirs as a module; `stubs` stand for what it imports and does not need here."""
    modules = {}
    for name, members in stubs.items():
        modules[name.replace("__", ".")] = module = types.ModuleType(name)
        vars(module).update(members)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules), mock.patch("torch.compile", plainly):
        spec.loader.exec_module(module)
    return module


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def deco(checkout: pathlib.Path) -> dict[str, np.ndarray]:
    """Their loss, by the methods of their trainer."""
    nothing = dict.fromkeys(("no_grad", "Normalize", "save_image", "IMAGENET_DEFAULT_MEAN", "IMAGENET_DEFAULT_STD"))
    base = {"BaseTrainer": torch.nn.Module}
    packages = ("timm", "timm__data", "torchvision", "torchvision__transforms", "torchvision__utils", "src__utils__no_grad")
    stubs = dict.fromkeys(packages, nothing) | {"src__diffusion__base__training": base}
    stubs |= {name: {} for name in ("src", "src__utils", "src__diffusion", "src__diffusion__base")}
    stubs["src__diffusion__base__scheduling"] = {"BaseScheduler": object}
    theirs = load(checkout / NEEDED["deco"][1][0], **stubs).REPATrainer
    trainer = theirs.__new__(theirs)
    torch.nn.Module.__init__(trainer)
    trainer.block_size = 8
    trainer.dct_mat = trainer._create_dct_matrix(8)
    weights = trainer._build_freq_weight(quality=85, mode="inv_gamma", gamma=1.0)
    said, target = (torch.from_numpy(v).permute(0, 3, 1, 2) for v in case.velocities())
    difference = trainer._dct(trainer._rgb2ycbcr(said)) - trainer._dct(trainer._rgb2ycbcr(target))
    return {"deco/weights": weights[0, :, 0, 0].numpy(), "deco/loss": (weights * difference**2).mean().numpy()}


def internal_guidance(checkout: pathlib.Path) -> dict[str, np.ndarray]:
    """Their two losses, and one step of their sampler from pure noise, which is their velocity with its sign turned."""
    arrays = tensors(case.internal_batch())
    loss = load(checkout / "SiT/loss.py")

    def outputs(x, t, y):
        return -arrays["final"], -arrays["early"], None

    times = (1 - arrays["t"])[:, None, None, None]
    with mock.patch("torch.rand", return_value=times), mock.patch("torch.randn_like", return_value=arrays["noise"]):
        final, early = loss.IGLoss()(outputs, arrays["image"], torch.zeros(3, dtype=torch.long))
    weight = float(re.search(r"align_loss\.mean\(\) \* ([\d.]+)", (checkout / "SiT/train.py").read_text())[1])
    found = {"internal/losses": np.array([final.mean(), early.mean(), final.mean() + weight * early.mean()])}

    samplers, values = load(checkout / "SiT/samplers.py"), tensors(case.internal())

    def network(x, t, y):
        null = (y == 1000)[:, None, None, None]
        final, early = (torch.cat([values[name]] * (len(x) // 2)) for name in ("final", "early"))
        final_null, early_null = (torch.cat([values[name]] * (len(x) // 2)) for name in ("final_null", "early_null"))
        return -torch.where(null, final_null, final), -torch.where(null, early_null, early)

    scales = {"cfg_scale": case.GUIDANCE, "sg_scale": case.SCALE}
    drawn = samplers.euler_maruyama_ig_sampler(network, values["x"], torch.tensor([1, 2]), num_steps=1, **scales)
    return found | {"internal/velocity": drawn.float().numpy()}


@mock.patch("torch.Tensor.cuda", lambda tensor: tensor)
def pixelrepa(checkout: pathlib.Path) -> dict[str, np.ndarray]:
    """One attention layer of theirs over in-context and image tokens, and the in-context tokens that its model makes."""
    util = load(checkout / "util/model_util.py")
    theirs = load(checkout / "model_pixelREPA.py", util={}, util__model_util=vars(util))
    arrays, width = tensors(case.attention()), case.WIDTH
    layer = theirs.Attention(width, case.HEADS, qkv_bias=False).eval()
    state = {"qkv.weight": arrays["qkv"], "proj.weight": arrays["proj"], "proj.bias": arrays["proj_bias"]}
    layer.load_state_dict(state | {"q_norm.weight": arrays["q_norm"], "k_norm.weight": arrays["k_norm"]})
    rope = util.VisionRotaryEmbeddingFast(dim=width // case.HEADS // 2, pt_seq_len=case.GRID, num_cls_token=case.CONTEXT)
    sizes = {"input_size": 32, "hidden_size": width, "depth": 3, "num_heads": case.HEADS, "bottleneck_dim": 8}
    model = theirs.JiT(**sizes, num_classes=1, in_context_len=case.CONTEXT, in_context_start=1).eval()
    given, seen = tensors(case.context()), []
    with torch.no_grad():
        model.in_context_posemb.copy_(given["table"][None])
        model.y_embedder.embedding_table.weight.copy_(given["label"])
        model.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(torch.zeros(2, 3, 32, 32), torch.zeros(2), torch.tensor([0, 1]))
        attended = layer(arrays["x"], rope)
    return {"context/attention": attended.numpy(), "context/tokens": seen[0][:, : case.CONTEXT].numpy()}


def lakonlab(checkout: pathlib.Path) -> dict[str, np.ndarray]:
    """Their velocity; their time is 1 - t, their output and velocity have the opposite sign of ours."""
    theirs, arrays = load(checkout / NEEDED["lakonlab"][1][0]), tensors(case.asym())
    layer = type("Layer", (torch.nn.Module, theirs.AsymFlowMixin), {"num_timesteps": 1, "sigma_min": 0.04})()
    layer.init_asymflow_buffers(*arrays["basis"].shape)
    layer.proj_buffer.copy_(arrays["basis"])
    calibration = layer.asymflow_calibration(1 - arrays["t"], len(arrays["t"]), 3)
    return {"asym/velocity": -layer.asymflow_velocity(-arrays["said"], arrays["x_t"], calibration).numpy()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (repository, _) in NEEDED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=pathlib.Path, required=True, help=f"checkout of {repository}")
    parser.add_argument("--record", action="store_true", help="rewrite tests/golden/options.npz")
    arguments = vars(parser.parse_args())
    found = {}
    for name, (repository, files) in NEEDED.items():
        checkouts.require(name.replace("_", "-"), arguments[name], of=repository, files=files)
        found |= globals()[name](arguments[name])
    if arguments["record"]:
        np.savez_compressed(case.ANSWERS, **found)
        print(f"wrote {case.ANSWERS}")
        return 0
    worst = max(float(np.abs(case.answers()[name] - value).max()) for name, value in found.items())
    print(f"largest difference from tests/golden/options.npz: {worst:.2g}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
