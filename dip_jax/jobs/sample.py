"""Draw images from a trained model: a picture, a folder, or the .npz that the ADM evaluator reads.

Examples:
  python -m dip_jax sample --workdir=runs/demo --out=grid.png                        a row per class
  python -m dip_jax sample --workdir=runs/demo --labels=3,coffee --num_samples=16 --out=some.png --trajectory=steps.png
  python -m dip_jax sample --workdir=runs/xl --num_samples=50000 --out=samples.npz   50 per class, labels interleaved
  python -m dip_jax sample --workdir=runs/xl --guide=runs/xl/checkpoints/40000 --out=guided.png      autoguidance

A killed run into an .npz or a directory goes on where it stopped when the same command is given again, on any number of hosts:
finished batches are kept, and the file is the same to the byte. A .png is drawn anew. Sample i is a function of the weights,
the options and (seed, i, label); batch size, devices and number of hosts change its rounding at most.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from dip_jax import config
from dip_jax.checkpoints import averages, checkpoint
from dip_jax.checkpoints import directories as step_files
from dip_jax.data import prepared
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.models import dip
from dip_jax.reporting import console, figures
from dip_jax.runtime import command_line, distributed, storage
from dip_jax.runtime.signals import stopping_at_once
from dip_jax.sampling import protocol, sample_files, trajectories
from dip_jax.sampling.labels import check_labels, interleave
from dip_jax.typing import Params

_SHOWN = 4  # samples in the trajectory picture


def sample(
    model: dip.DiP,
    params: Params,
    *,
    labels: Sequence[int] | np.ndarray,
    seed: int = 0,
    steps: int = 100,
    guidance: float = 2.9,
    interval: tuple[float, float] = (0.11, 0.97),
    solver: str = "euler",
    t_shift: float = 1.0,
    internal_guidance: float = 1.0,
    batch_size: int = 64,
    guide: tuple[dip.DiP, Params] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Draws one image per label.

    Args:
        model, params: from `dip_jax.load` or `dip_jax.build`.
        labels: N classes in [0, num_classes); num_classes itself draws without a class.
        seed: image i is a function of (seed, i, labels[i]) alone.
        steps, guidance, interval, solver, t_shift, internal_guidance, batch_size: as in `config.Sample`.
        guide: a weaker model and its weights, which guide in the place of no class (autoguidance).
        mesh: devices to spread the images over; by default this process's own.

    Returns:
        uint8 [N,H,W,3].

    Raises:
        UserError: for a label or an option out of range, before compiling.
    """
    options = config.Sample(
        solver=solver,
        steps=steps,
        guidance=guidance,
        interval=interval,
        t_shift=t_shift,
        internal_guidance=internal_guidance,
        batch_size=batch_size,
    )
    drawn = {"labels": labels, "seed": seed, "options": options, "guide": guide and trajectories.Weaker(*guide)}
    batches = trajectories.draw_batches(model, params, **drawn, mesh=mesh)
    return np.concatenate([images for _, images in batches])


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    own = {"flag_values": flags}
    absl_flags.DEFINE_string("workdir", None, "run whose newest checkpoint is used", **own)
    absl_flags.DEFINE_string("checkpoint", None, "instead: one step directory, what `convert` wrote, or hf://OWNER/NAME", **own)
    absl_flags.DEFINE_string("out", None, "FILE.png (a row per class), FILE.npz (ADM's format) or a directory of PNGs", **own)
    absl_flags.DEFINE_integer("num_samples", 64, "images to draw", lower_bound=1, **own)
    absl_flags.DEFINE_integer("classes", None, "draw classes 0..N-1, interleaved; default: all classes", **own)
    absl_flags.DEFINE_list("labels", None, "instead: draw these classes, by number or name, interleaved: 207,cat", **own)
    absl_flags.DEFINE_integer("seed", 0, "image i depends on (seed, i, its class)", **own)
    absl_flags.DEFINE_integer("steps", None, "steps of the solver; default: the run's config, as for the next five", **own)
    absl_flags.DEFINE_float("guidance", None, "guidance scale; 1 is none", **own)
    absl_flags.DEFINE_list("interval", None, "low,high: guidance applies where low < t < high (t=1 is data)", **own)
    absl_flags.DEFINE_float(
        "internal_guidance", None, "internal guidance scale, of a model with model.internal; 1 is none", **own
    )
    absl_flags.DEFINE_list("internal_interval", None, "low,high: it applies where low <= t <= high", **own)
    absl_flags.DEFINE_string("solver", None, "euler, heun, ab2 or sde", **own)
    absl_flags.DEFINE_float("t_shift", None, "time shift; above 1 spends more steps near the noise", **own)
    absl_flags.DEFINE_integer("batch_size", None, "images at once, over all devices of a host", **own)
    absl_flags.DEFINE_string(
        "guide",
        None,
        "workdir or step whose averaged weights guide in the place of no class: a smaller model, an earlier step",
        **own,
    )
    absl_flags.DEFINE_bool("ema", True, "draw from the averaged weights (--noema: from the last update's)", **own)
    absl_flags.DEFINE_float("ema_decay", None, "of several averages (optim.ema_decays) the one with this decay", **own)
    absl_flags.DEFINE_enum("precision", "default", ("default", "highest"), "highest: float32 throughout", **own)
    absl_flags.DEFINE_string("trajectory", None, "FILE.png that shows some samples from noise to image", **own)
    command_line.define_processes(flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command: see the module's docstring."""
    if (flags.workdir is None) == (flags.checkpoint is None):
        raise UserError("name one of --workdir=DIR and --checkpoint=DIR")
    if flags.out is None:
        raise UserError("--out is missing: FILE.png, FILE.npz or a directory")
    distributed.start()
    with stopping_at_once():
        _sample(flags)


def _sample(flags: absl_flags.FlagValues) -> None:
    kind = sample_files.kind_of(flags.out)
    if flags.trajectory is not None:
        storage.require_file_name(flags.trajectory, flag="--trajectory", suffix=".png")
    for picture in ([flags.out] if kind == ".png" else []) + ([flags.trajectory] if flags.trajectory else []):
        sample_files.require_folder(storage.absolute(picture).parent)
    weights = _weights(flags)
    unread = checkpoint.ITEMS_UNREAD[weights]
    path = step_files.find(flags.workdir or flags.checkpoint, verify=True, report=distributed.say, unread=unread)
    record = checkpoint.read_record(path)
    options = _options(flags, record.config.sample)
    dtype = "float32" if flags.precision == "highest" else None
    model, params = checkpoint.load(path, weights=weights, dtype=dtype, verify=False)
    names = list(record.classes) or class_names(record.config, model)
    labels = check_labels(interleave(_classes(flags, names), flags.num_samples), model)
    arguments = {"labels": labels, "seed": flags.seed, "options": options, "guide": _open_guide(flags, model)}
    name = weights if weights in ("ema", "raw") else f"ema of decay {flags.ema_decay}"
    made = {"weights": name, "step": path.name, "precision": flags.precision}
    settings = protocol.describe(model, params, made, **arguments)
    for line in _describe(settings):
        distributed.say(line)
    with jax.default_matmul_precision("highest" if flags.precision == "highest" else None):
        try:
            _write(flags.out, kind, model, params, settings, names=names, **arguments)
        except KeyboardInterrupt:
            again = "starts again" if kind == ".png" else "goes on where it stopped"
            raise Interrupted(f"stopped; the same command {again}", code=Exit.INTERRUPTED) from None
        if flags.trajectory is not None:
            arguments["labels"] = labels[:_SHOWN]
            distributed.on_main(lambda: _save_picture(flags.trajectory, _strip(model, params, names, **arguments)))


def _open_guide(flags: absl_flags.FlagValues, model: dip.DiP) -> trajectories.Weaker | None:
    """The model of --guide, once it is seen to fit."""
    if flags.guide is None:
        return None
    guide = trajectories.Weaker(*checkpoint.load(flags.guide, dtype=model.config.dtype))
    guide.require_fit(model)
    return guide


def _weights(flags: absl_flags.FlagValues) -> str:
    """The item of the step that the weights come from, as `checkpoint.load` names it."""
    if flags.ema_decay is None:
        return "ema" if flags.ema else "raw"
    if not flags.ema:
        raise UserError("name one of --noema and --ema_decay, not both")
    return averages.find(flags.workdir or flags.checkpoint, flags.ema_decay, report=distributed.say)


def _options(flags: absl_flags.FlagValues, base: config.Sample) -> config.Sample:
    """The run's sampling options with those that the command line names."""
    named = {key: flags[key].value for key in ("steps", "guidance", "internal_guidance", "solver", "t_shift", "batch_size")}
    for name in ("interval", "internal_interval"):
        if (ends := flags[name].value) is not None:
            if len(ends) != 2:
                raise UserError(f"--{name}={','.join(ends)} must be low,high, such as 0.1,1.0")
            named[name] = tuple(command_line.number(float, name, text) for text in ends)
    return dataclasses.replace(base, **{key: value for key, value in named.items() if value is not None})


def _classes(flags: absl_flags.FlagValues, names: Sequence[str]) -> Sequence[int]:
    if flags.labels is not None and flags.classes is not None:
        raise UserError("name one of --labels and --classes, not both")
    if flags.labels is not None:
        return [_class_of(text.strip(), names) for text in flags.labels]
    count = len(names) if flags.classes is None else flags.classes
    if not 1 <= count <= len(names):
        raise UserError(f"--classes={count} must lie in 1..{len(names)}, the classes of this model")
    return range(count)


def _class_of(text: str, names: Sequence[str]) -> int:
    """A class by its number or, where the text is none, by its name; capitals count only where they decide."""
    with contextlib.suppress(ValueError):
        return int(text)
    found = [i for i, name in enumerate(names) if name == text]
    found = found or [i for i, name in enumerate(names) if name.casefold() == text.casefold()]
    if len(found) != 1:
        near = difflib.get_close_matches(text, names, n=1)
        nearest = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--labels: {text!r} names no class of this model, {names[0]!r} .. {names[-1]!r} (0..{len(names) - 1}){nearest}"
        )
    return found[0]


def _describe(settings: Mapping[str, Any]) -> list[str]:
    height, width = settings["model"]["image_size"]
    devices = f"{jax.device_count()} {jax.devices()[0].platform}"
    return console.aligned(
        {"drawing": f"{settings['samples']} images of {height}x{width}", **console.sampling(settings), "devices": devices}
    )


def _write(
    out: str, kind: str, model: dip.DiP, params: Params, settings: Mapping, *, names: Sequence[str], **arguments
) -> None:
    labels, size = arguments["labels"], arguments["options"].batch_size
    if kind == ".png":  # small: one host draws it
        distributed.on_main(lambda: _save_picture(out, _grid(model, params, names, **arguments)))
        return
    if kind == ".npz":
        output = sample_files.NpzFile(out, labels=labels, image_shape=(*model.config.image_size, 3), batch_size=size)
    else:
        output = sample_files.PictureFolder(out, labels=labels, batch_size=size)
    distributed.on_main(lambda: output.open(settings))
    distributed.require_shared(output.path.parent if kind == ".npz" else output.path, flag="--out")
    mine = range(jax.process_index(), -(-len(labels) // size), jax.process_count())
    todo = [batch for batch in mine if not output.finished(batch)]
    done = sum(min(size, len(labels) - batch * size) for batch in mine if batch not in set(todo))
    total = done + sum(min(size, len(labels) - batch * size) for batch in todo)

    def draw() -> None:
        for batch, images in _with_progress(model, params, total=total, done=done, only=todo, **arguments):
            output.write(batch, images)

    distributed.on_all(draw)
    distributed.on_main(output.close)
    distributed.say(f"wrote {out}")


def _with_progress(model: dip.DiP, params: Params, *, total: int, done: int, **arguments) -> Iterator[tuple[int, np.ndarray]]:
    with tqdm(total=total, initial=done, unit=" images", disable=None if distributed.is_main() else True) as bar:
        for batch, images in trajectories.draw_batches(model, params, **arguments):
            yield batch, images
            bar.update(len(images))


def _grid(model: dip.DiP, params: Params, names: Sequence[str], **arguments) -> Image.Image:
    labels = arguments["labels"]
    images = [images for _, images in _with_progress(model, params, total=len(labels), done=0, **arguments)]
    return figures.class_grid(figures.Labelled(np.concatenate(images), labels), names)


def _strip(model: dip.DiP, params: Params, names: Sequence[str], **arguments) -> Image.Image:
    return figures.trajectory(trajectories.draw_frames(model, params, **arguments), names)


def _save_picture(out: str, picture: Image.Image) -> None:
    with storage.absolute(out).open("wb") as file:
        picture.save(file, format="png")
    distributed.say(f"wrote {out}")


def class_names(run: config.Config, model: dip.DiP) -> list[str]:
    """The dataset's names where it is at hand, else numbers."""
    try:
        names = prepared.open_dataset(run.data.path, image_size=run.model.image_size[0]).classes if run.data.path else []
    except UserError:
        names = []
    return names if len(names) == model.config.num_classes else [f"class {i}" for i in range(model.config.num_classes)]
