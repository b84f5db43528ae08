"""Published PyTorch weights as a checkpoint that sample, evaluate and dip_jax.load read, and a checkpoint as PyTorch weights.

Examples:
  python -m dip_jax convert --checkpoint=dip_xl.ckpt --out=runs/dip
  python -m dip_jax convert --from=pixnerd --checkpoint=pixnerd_xl.ckpt --weights=raw --dtype=float32 --out=runs/pixnerd
  python -m dip_jax convert --from=ddt --checkpoint=dit_xl.safetensors --image_size=256 --out=runs/dit
  python -m dip_jax convert --to=dip-pytorch --checkpoint=runs/dip --out=dip_xl.pth
  python -m dip_jax convert --to=release --checkpoint=runs/dip --dtype=bfloat16 --out=dip_xl
  python -m dip_jax convert --to=release --checkpoint=runs/dip --ema_decay=0.9996 --out=dip_xl_9996
  python -m dip_jax convert --to=release --checkpoint=runs/dip --dtype=bfloat16 --out=hf://OWNER/dip_xl

dip: the DiP that its authors published.
pixnerd: PixNerd's class-conditional pixel models, which become DiP with the coordinate-MLP head.
ddt: the single-stack DiT of the DDT repository on pixels, which becomes DiT-only; it can start a DiP run (train --init_from).
Without --from the names of the tensors decide. Sizes are read from the tensors, except the side of the images. Nothing that
the file pickles is executed; a missing, extra or mis-shaped tensor is an error that lists them.

--to writes what the published code takes by `network.load_state_dict(torch.load(FILE, weights_only=True), strict=True)`, in the
format of torch, for which it needs no other library. --to=safetensors holds the same tensors, of whichever network it is.
Both are float32, are read back by this command to the same bits, and have the config beside them as FILE.json.
--checkpoint may be an address on the Hugging Face Hub, hf://OWNER/NAME[/PATH][@REVISION] (pip install huggingface_hub).
--to=release makes a folder to hand out: averaged weights, config, SHA-256 of both, and a model card to complete. It is what
dip_jax.load, sample --checkpoint and evaluate --workdir read. --dtype=bfloat16 stores the weights in half the bytes.
With --out=hf://OWNER/NAME[/PATH][@BRANCH] it is given to the hub.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
import safetensors.numpy
from absl import flags as absl_flags
from etils import epath

from dip_jax import config
from dip_jax.checkpoints import averages, directories, hub, release, torch_file, torch_names, torch_writing
from dip_jax.checkpoints import checkpoint as checkpoints
from dip_jax.checkpoints.torch_tables import NETWORKS
from dip_jax.data import prepared
from dip_jax.errors import UserError
from dip_jax.runtime import command_line, distributed, storage

# Prefixes that the official training gives to the two copies of the network, by the weights that `load` calls the same.
_PREFIXES = {"ema": "ema_denoiser.", "raw": "denoiser."}
_OTHER_MODULES = ("conditioner.", "diffusion_sampler.", "diffusion_trainer.", "ema_tracker.", "vae.")
_COMPILED = "_orig_mod."  # what torch.compile puts before every name
_BOOKKEEPING = ("n_averaged", "num_batches_tracked", "num_updates")

Tensors = dict[str, np.ndarray]


def _safetensors_bytes(tensors: Iterable[tuple[str, np.ndarray]]) -> bytes:
    return safetensors.numpy.save(dict(tensors))


_PYTORCH = (".pth", ".pt", ".ckpt")
# --to -> the network that it has to be (None: whichever it is), the file's format, and what its name ends in
TARGETS: dict[str, tuple[str | None, Callable[[Iterable[tuple[str, np.ndarray]]], bytes], tuple[str, ...]]] = {
    "dip-pytorch": ("dip", torch_writing.torch_bytes, _PYTORCH),
    "pixnerd-pytorch": ("pixnerd", torch_writing.torch_bytes, _PYTORCH),
    "safetensors": (None, _safetensors_bytes, (".safetensors",)),
}
RELEASE = "release"  # the one --to that is a folder


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    own = {"flag_values": flags}
    absl_flags.DEFINE_enum("from", None, list(NETWORKS), "whose weights the file holds; left out, its names tell", **own)
    absl_flags.DEFINE_enum("to", None, [*TARGETS, RELEASE], "instead: write a checkpoint of ours as this", **own)
    absl_flags.DEFINE_string(
        "checkpoint", None, ".ckpt, .pth, .pt or .safetensors file; with --to a workdir or step", required=True, **own
    )
    absl_flags.DEFINE_string(
        "out", None, "directory to write the checkpoint to; with --to=...-pytorch or safetensors a file", required=True, **own
    )
    absl_flags.DEFINE_enum("weights", "ema", list(_PREFIXES), "averaged or last weights, where there are both", **own)
    absl_flags.DEFINE_float("ema_decay", None, "with --to: of several averages the one with this decay", **own)
    absl_flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "what the model computes in (default: bfloat16); with --to=release what its weights are stored in (default: float32)",
        **own,
    )
    absl_flags.DEFINE_list("image_size", None, "side, or height,width, of the images (default: 16 patches)", **own)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    source, dtype = flags["from"].value, flags.dtype
    if flags.to is None:
        storage.require_folder_name(flags.out, flag="--out")
        command_line.refuse(flags, "ema_decay")
        image_size = None if flags.image_size is None else _sides(flags.image_size)
        options = {"weights": flags.weights, "image_size": image_size, "dtype": dtype or "bfloat16"}
        path = convert(source, checkpoint=flags.checkpoint, out=flags.out, **options)
        print(f"{path}: ready for sample, evaluate and dip_jax.load")
        return
    given = {"from": source, "image_size": flags.image_size, "dtype": None if flags.to == RELEASE else dtype}
    if misplaced := [f"--{name}" for name, value in given.items() if value is not None]:
        raise UserError(
            f"{', '.join(misplaced)} cannot stand beside --to={flags.to}, which writes the tensors of a checkpoint as they are"
        )
    weights = _weights(flags)
    said = weights if flags.ema_decay is None else f"ema of decay {flags.ema_decay}"
    if flags.to == RELEASE:
        options = {"weights": weights, "dtype": dtype or "float32"}
        if storage.is_on_hub(flags.out):
            page = give_release(flags.checkpoint, out=flags.out, **options)
            print(
                f"{page}: a repository made just now is private; complete its README.md, which has a TODO where it cannot know"
            )
            return
        storage.require_folder_name(flags.out, flag="--out")
        path = make_release(flags.checkpoint, out=flags.out, **options)
        print(f"{path}: {said} weights, config and hashes; complete its README.md, which has a TODO where it cannot know")
        return
    storage.require_file_name(flags.out, flag="--out", suffix=TARGETS[flags.to][2])
    path = export(flags.to, checkpoint=flags.checkpoint, out=flags.out, weights=weights)
    print(f"{path}: {said} weights as {flags.to}; the config is beside it")


def _weights(flags: absl_flags.FlagValues) -> str:
    """The item of the step that is written, as `checkpoint.load` names it."""
    if flags.ema_decay is None:
        return flags.weights
    if flags.weights == "raw":
        raise UserError("name one of --weights=raw and --ema_decay, not both")
    return averages.find(flags.checkpoint, flags.ema_decay, report=distributed.say)


def make_release(
    checkpoint: epath.PathLike, *, out: epath.PathLike, weights: str = "ema", dtype: str = "float32", address: str = ""
) -> epath.Path:
    """Writes a checkpoint's weights as a release (`checkpoints/release.py`); returns its folder.

    Args:
        checkpoint: a workdir, one of its steps, what `convert` wrote, or a release on a hub.
        out: the folder to make.
        weights: "ema", "raw", or the item of another average, such as "ema_1".
        dtype: what the weights are stored in, "float32" or "bfloat16".
        address: where it will be loaded from, for the card; the folder's name where it is not given.

    Raises:
        UserError: as `load` and `release.write_release`.
    """
    unread = checkpoints.ITEMS_UNREAD[weights]
    path = directories.find(checkpoint, verify=True, report=distributed.say, unread=unread)
    record = checkpoints.read_record(path)
    _, params = checkpoints.load(path, weights=weights, verify=False)
    record = dataclasses.replace(record, classes=record.classes or _dataset_classes(record.config))
    step = int(path.name) if path.name.isdecimal() else 0
    return release.write_release(out, params, record, step=step, weights=weights, dtype=dtype, address=address)


def give_release(checkpoint: epath.PathLike, *, out: str, weights: str = "ema", dtype: str = "float32") -> str:
    """`make_release`, given to the hub in one commit; returns the commit's page.

    Args:
        out: an address, `hf://OWNER/NAME[/PATH][@BRANCH]`.

    Raises:
        UserError: as `make_release` and `checkpoints/hub.py`; the hub is asked before anything is written.
    """
    place = hub.parse(out)
    directories.find(checkpoint, verify=False, report=distributed.say)  # before a repository is made for nothing
    hub.prepare_upload(out)
    with tempfile.TemporaryDirectory() as folder:
        name = (place.path or place.repo).split("/")[-1]
        path = make_release(checkpoint, out=epath.Path(folder) / name, weights=weights, dtype=dtype, address=out)
        return hub.upload(path, out)


def _dataset_classes(run: config.Config) -> tuple[str, ...]:
    """Names by the dataset, for a checkpoint of before they were kept in it; none where it is not at hand."""
    try:
        names = prepared.open_dataset(run.data.path, image_size=run.model.image_size[0]).classes if run.data.path else ()
    except UserError:
        return ()
    return tuple(names) if len(names) == run.model.num_classes else ()


def _sides(words: list[str]) -> tuple[int, ...]:
    if not 1 <= len(words) <= 2 or not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--image_size={','.join(words)} must be one or two numbers, such as 256 or 256,512 (height,width)")
    return tuple(map(int, words))


def convert(
    source: str | None = None,
    *,
    checkpoint: epath.PathLike,
    out: epath.PathLike,
    weights: str = "ema",
    image_size: tuple[int, ...] | None = None,
    dtype: str = "bfloat16",
) -> epath.Path:
    """Reads a PyTorch file and writes our checkpoint; returns the step directory. Says in one line what it found.

    Args:
        source: row of NETWORKS; None is told by the names of the tensors.
        checkpoint: the file, or its address on the hub.
        out: the directory to make.
        weights: "ema" or "raw", of a file that holds both.
        image_size: side of the images, or (H, W), multiples of the patch size; None is 16 patches.
        dtype: what the model computes in; the weights are float32.

    Raises:
        UserError: for an unreadable file, tensors that do not fit, an image size that the patch size does not divide, or an
            `out` that holds a checkpoint already.
    """
    if storage.is_on_hub(checkpoint):
        checkpoint = hub.fetch_file(checkpoint)
    if epath.Path(checkpoint).is_dir():
        raise UserError(f"--checkpoint={checkpoint} is a directory: name a file to read, or --to=... to write one from it")
    tensors = torch_file.read_tensors(checkpoint)
    try:
        tensors, notes = own_tensors(tensors, weights=weights)
        source = source or torch_names.recognise(tensors)
        model, params = torch_names.to_params(tensors, source=source, image_size=image_size, dtype=dtype)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    height, width = model.image_size
    assumed = "" if image_size else " (16 patches: the tensors do not tell, --image_size does)"
    sizes = f"{model.depth} x {model.width}, {model.num_heads} heads, patch {model.patch_size}, {model.num_classes} classes"
    notes = [f"{source}, {sizes}", f"images {height} x {width}{assumed}", *notes]
    distributed.say(f"{checkpoint}: {'; '.join(notes)}")
    return checkpoints.write_weights(out, params, config=config.Config(model=model))


def own_tensors(tensors: Tensors, *, weights: str) -> tuple[Tensors, list[str]]:
    """The network's own tensors without prefix, and notes on what was taken and what was passed over.

    Raises:
        UserError: if the file holds only the other weights than were asked for by "raw".
    """
    bookkeeping = [name for name in tensors if name.split(".")[-1] in _BOOKKEEPING]
    notes = [f"no weights, passed over: {', '.join(bookkeeping)}"] if bookkeeping else []
    tensors = {name: tensor for name, tensor in tensors.items() if name not in bookkeeping}
    there = [kind for kind, prefix in _PREFIXES.items() if any(name.startswith(prefix) for name in tensors)]
    if there:
        if weights == "raw" and "raw" not in there:
            raise UserError("it holds averaged weights alone: leave out --weights=raw")
        taken = weights if weights in there else there[0]
        others = [name for name in tensors if name.startswith(_OTHER_MODULES)]
        modules = ", ".join(sorted({name.split(".")[0] for name in others}))
        notes += [f"of other modules, passed over: {modules} ({len(others)} tensors)"] if others else []
        notes = [f"{'averaged' if taken == 'ema' else 'last'} weights ({_PREFIXES[taken]})", *notes]
        unread = (*(_PREFIXES[kind] for kind in there if kind != taken), *_OTHER_MODULES)
        prefix = _PREFIXES[taken]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if not name.startswith(unread)}
    if all(name.startswith(_COMPILED) for name in tensors):
        tensors = {name.removeprefix(_COMPILED): tensor for name, tensor in tensors.items()}
    return tensors, notes


def export(target: str, *, checkpoint: epath.PathLike, out: epath.PathLike, weights: str = "ema") -> epath.Path:
    """Writes a checkpoint of ours as PyTorch weights, and its config beside them as `OUT.json`; returns the file.

    Args:
        target: row of TARGETS.
        checkpoint: a workdir or one of its steps, as for `load`.
        out: the file to make.
        weights: "ema", "raw", or the item of another average, such as "ema_1".

    Raises:
        UserError: if the network is none of the published ones or another than `target` asks for (naming the options), a file
            exists already, or the disk is full; or as `load`.
    """
    out = storage.absolute(out)
    beside = out.parent / f"{out.name}.json"
    for path in (out, beside):
        if path.exists():
            raise UserError(f"{path} exists already: choose another --out")
    wanted, to_bytes, _ = TARGETS[target]
    unread = checkpoints.ITEMS_UNREAD[weights]
    step = directories.find(checkpoint, verify=True, report=distributed.say, unread=unread)
    record = checkpoints.read_record(step)
    try:
        network = torch_names.network_of(record.config.model)
        if wanted not in (None, network):
            raise UserError(f"these are {network}'s weights, not {wanted}'s: use --to=safetensors or {network}-pytorch")
    except UserError as error:
        raise UserError(f"{step} cannot become {target}: {error}") from None
    model, params = checkpoints.load(step, weights=weights, verify=False)
    data = to_bytes(torch_names.to_tensors(params, model.config))
    storage.require_writable(out.parent)
    storage.require_space(out.parent, len(data))
    storage.write_bytes(out, data)
    storage.write_text(beside, json.dumps(config.to_dict(record.config), indent=2) + "\n")
    return out
