"""Runs the authors' own training step for 20 steps in float32 and records it as tests/golden/official_training.npz.

    python benchmarks/official_training.py --checkout=DIP_CHECKOUT --dinov2=DINOV2_CHECKOUT [--record]

Needs PyTorch (a CPU is enough), torchvision, timm, transformers and lightning; a checkout of https://github.com/NJU-PCALab/DiP,
with the files that it shares with its sibling https://github.com/MCG-NJU/PixNerd taken from there where it lacks them; and one
of https://github.com/facebookresearch/dinov2. The code that runs is theirs: `LightningModel` with its `training_step` and its
optimizer groups, `REPATrainer`, `DiP`, `DINOv2`, `LabelConditioner`, `SimpleEMA`. Replaced are their random numbers (by the
arrays of `tests/support/training_case.py`, which explains every recorded field), bfloat16 in the encoder (by float32) and what
needs a CUDA device. Without --record, what comes out is compared with the record.
"""

import argparse
import contextlib
import copy
import json
import pathlib
import sys
import tempfile
import types

import checkouts
import numpy as np

checkouts.require_packages("torch", "torchvision", "timm", "transformers", "lightning")

import torch  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support")]

import training_case as case  # noqa: E402

THEIRS = ["src/lightning_model.py", "src/diffusion/flow_matching/training_repa.py", "src/models/transformer/dip.py"]
TEACHER = ["dinov2/models/vision_transformer.py"]

HUBCONF = """
import functools
from dinov2.layers import MemEffAttention, NestedTensorBlock
from dinov2.models.vision_transformer import DinoVisionTransformer

def tiny():  # otherwise as `dinov2_vitb14` of dinov2/hub/backbones.py
    return DinoVisionTransformer(
        img_size=14 * {table}, patch_size=14, embed_dim={width}, depth={depth}, num_heads={width} // 64, init_values=1.0,
        block_fn=functools.partial(NestedTensorBlock, attn_class=MemEffAttention), block_chunks=0,
    )
"""


class Float32Torch(types.ModuleType):
    """`torch`, in which bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)


def without_cuda() -> None:
    """Calls that ask for a CUDA device stay where they are."""
    torch.Tensor.cuda = lambda self: self
    torch.cuda.Stream = lambda: None


def load(module: torch.nn.Module, part: str) -> dict[str, list[int]]:
    """Gives `module` its weights; returns the shape of each."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors = case.random_tensors(part, shapes)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=True)
    return shapes


def build_encoder(settings: dict) -> torch.nn.Module:
    """Their wrapper around a small DINOv2, in float32."""
    from src.models import encoder

    encoder.torch = Float32Torch("torch")
    sizes = {name: settings[f"encoder_{name}"] for name in ("width", "depth", "table")}
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "hubconf.py").write_text(HUBCONF.format(**sizes))
        return encoder.DINOv2(f"{folder}/tiny")


def build(settings: dict) -> tuple[torch.nn.Module, dict]:
    """Their LightningModel as configs_c2i/dip_xl.yaml puts it together, small; and the shapes of its weights by part."""
    from src.callbacks.simple_ema import SimpleEMA
    from src.diffusion.base.guidance import simple_guidance_fn
    from src.diffusion.flow_matching.sampling import EulerSampler
    from src.diffusion.flow_matching.scheduling import LinearScheduler
    from src.diffusion.flow_matching.training_repa import REPATrainer
    from src.lightning_model import LightningModel
    from src.models.autoencoder.pixel import PixelAE
    from src.models.conditioner.class_label import LabelConditioner
    from src.models.transformer.dip import DiP
    from src.utils.copy import copy_params
    from src.utils.no_grad import no_grad

    def optimizer(groups):
        betas = (settings["b1"], settings["b2"])
        lr, eps, decay = (settings[name] for name in ("learning_rate", "eps", "weight_decay"))
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=decay)

    width = settings["width"]
    denoiser = DiP(
        in_channels=3,
        patch_size=settings["patch_size"],
        num_groups=settings["num_heads"],
        hidden_size=width,
        num_cond_blocks=settings["depth"],
        num_classes=settings["num_classes"],
    )
    trainer = REPATrainer(
        scheduler=LinearScheduler(),
        feat_loss_weight=settings["weight"],
        lognorm_t=True,
        encoder=build_encoder(settings),
        align_layer=settings["layer"],
        proj_denoiser_dim=width,
        proj_hidden_dim=width,
        proj_encoder_dim=settings["encoder_width"],
        null_condition_p=settings["label_dropout"],
    )
    parts = {"denoiser": denoiser, "proj": trainer.proj, "encoder": trainer.encoder.encoder}
    shapes = {part: load(module, part) for part, module in parts.items()}
    sampler = EulerSampler(scheduler=LinearScheduler(), guidance_fn=simple_guidance_fn, num_steps=10)
    conditioner = LabelConditioner(settings["num_classes"])
    ema = SimpleEMA(decay=settings["ema"])
    module = LightningModel(PixelAE(), conditioner, denoiser, trainer, sampler, ema, optimizer)
    copy_params(module.denoiser, module.ema_denoiser)
    no_grad(module.ema_denoiser)
    return module, shapes


@contextlib.contextmanager
def drawing(drawn: dict[str, np.ndarray]):
    """Their trainer draws these numbers: once `rand` for the labels, `randn` for the times, `randn_like` for the noise."""
    numbers = {name: torch.from_numpy(drawn[name]) for name in ("uniform", "normal")}
    numbers["noise"] = torch.from_numpy(drawn["noise"].transpose(0, 3, 1, 2).copy())
    kept = torch.rand, torch.randn, torch.randn_like
    torch.rand = lambda *_, **__: numbers.pop("uniform")
    torch.randn = lambda *_, **__: numbers.pop("normal")
    torch.randn_like = lambda _: numbers.pop("noise")
    yield
    torch.rand, torch.randn, torch.randn_like = kept
    assert not numbers, f"{sorted(numbers)} were not drawn"


def train(module: torch.nn.Module, settings: dict) -> dict[str, np.ndarray]:
    """The steps; returns what is recorded of them."""
    from src.callbacks.simple_ema import SimpleEMA
    from torchvision.transforms import Normalize

    def trained():
        proj = module.diffusion_trainer.proj
        return named(module.denoiser) | {f"proj.{name}": tensor for name, tensor in named(proj).items()}

    losses, seen = [], []
    module.log_dict = lambda loss, **_: losses.append({name: value.item() for name, value in loss.items()})
    module.denoiser.register_forward_pre_hook(lambda _, given: seen.append([tensor.numpy().copy() for tensor in given]))
    fast, fast_net = SimpleEMA(decay=settings["ema_fast"]), copy.deepcopy(module.ema_denoiser)
    fast.setup_models(net=module.denoiser, ema_net=fast_net)
    module.on_train_start()
    found = {"digest/start": case.digest(trained())}
    optimizer = module.configure_optimizers()["optimizer"]
    for step in range(settings["steps"]):
        drawn = case.inputs(step)
        raw = torch.from_numpy(drawn["image"].transpose(0, 3, 1, 2).copy()) / 255  # as torchvision's to_tensor
        x = Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])(raw)
        with drawing(drawn):
            loss = module.training_step((x, drawn["label"], {"raw_image": raw}), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for tracker in (module.ema_tracker, fast):
            tracker.on_train_batch_end(types.SimpleNamespace(global_step=step + 1), module, None, None, step)
        print(f"step {step + 1:2}  " + "  ".join(f"{name} {value:.6f}" for name, value in losses[-1].items()), flush=True)
    names = {"loss": "loss", "loss_flow": "fm_loss", "loss_repa": "cos_loss"}
    found |= {ours: np.array([step[theirs] for step in losses]) for ours, theirs in names.items()}
    found |= {"t": np.stack([t for _, t, _ in seen]), "y": np.stack([y for *_, y in seen])}
    found["x_t"] = seen[0][0].transpose(0, 2, 3, 1)
    params, ema = trained(), named(module.ema_denoiser)
    found |= {"digest/params": case.digest(params), "digest/ema": case.digest(ema)}
    found["digest/ema_fast"] = case.digest(named(fast_net))
    for name in case.WHOLE:
        found |= {f"params/{name}": params[name], f"ema/{name}": ema[name]}
    return found


def named(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=pathlib.Path, required=True, help="checkout of NJU-PCALab/DiP")
    parser.add_argument("--dinov2", type=pathlib.Path, required=True, help="checkout of facebookresearch/dinov2")
    parser.add_argument("--record", action="store_true", help="rewrite tests/golden/official_training.npz")
    arguments = parser.parse_args()
    checkouts.require("checkout", arguments.checkout, of="NJU-PCALab/DiP", files=THEIRS)
    checkouts.require("dinov2", arguments.dinov2, of="facebookresearch/dinov2", files=TEACHER)
    sys.path[:0] = [str(arguments.checkout), str(arguments.dinov2)]
    without_cuda()
    module, shapes = build(case.SETTINGS)
    found = train(module, case.SETTINGS)
    if arguments.record:
        np.savez_compressed(case.ANSWERS, settings=json.dumps(case.SETTINGS), shapes=json.dumps(shapes), **found)
    with np.load(case.ANSWERS) as recorded:
        worst = max(np.abs(value - recorded[name]).max() / np.abs(recorded[name]).max() for name, value in found.items())
    print(f"largest difference from the record, relative to each field's largest value: {worst:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
