"""Judge samples of any framework: FID, sFID, Inception Score, precision, recall, and the protocol behind the numbers.

Examples:
  python -m dip_jax evaluate --workdir=runs/demo                             draws samples, compares, writes report.html
  python -m dip_jax evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --features=inception \\
      --weights=classify_image_graph_def.pb --out=metrics.json               the ADM protocol
  python -m dip_jax evaluate --samples=a.npz --samples=FOLDER_OF_PNGS --reference=datasets/photo_crops/validation

--samples and --reference each take an .npz (arr_0 uint8 [N, H, W, 3] and, if you like, labels arr_1 [N]), a folder of pictures
of one size, a dataset directory that `prepare` made, or an ADM file of statistics, which has distances alone. Each --samples is
a row.
With labels the command says where classes are unequal or in an order that spoils the Inception Score.
Metrics of features=lite0, whose weights a Python package ships, are named so (fid_lite0): they rank models on one dataset
and compare with no published number.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags
from etils import epath

from dip_jax import config
from dip_jax.checkpoints import averages, checkpoint, directories
from dip_jax.data import prepared
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.metrics import cache as kept
from dip_jax.metrics import features as feature_networks
from dip_jax.metrics import inputs
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile
from dip_jax.metrics.judge import Judge, open_judge
from dip_jax.reporting import console, report
from dip_jax.runtime import command_line, distributed, storage, writers
from dip_jax.runtime.signals import stopping_at_once
from dip_jax.sampling import sample_files, sampler, trajectories

GALLERY = 2000  # training images among which the nearest neighbour of a sample is looked up
_MOST_CLASSES = 100  # with more, the gallery holds too few images of a class
_REAL = "real training images"
_FRAMES = 4  # samples in the report's trajectory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Numbers, and how they were taken.

    Attributes:
        metrics: by name, with "N"; names end in the feature network's suffix.
        protocol: JSON values.
        notes: sentences that a reader of the numbers needs.
        sampling: how the samples were drawn, where they say so themselves (samples of this package do).
    """

    metrics: dict[str, float | int | None]
    protocol: dict[str, Any]
    notes: list[str]
    sampling: dict[str, Any]


def evaluate(
    samples: ImageSet | np.ndarray | str | os.PathLike,
    reference: ImageSet | ReferenceFile | np.ndarray | str | os.PathLike,
    *,
    features: str = "lite0",
    weights: str = "",
    batch_size: int = 50,
    gallery: ImageSet | None = None,
    patch_size: int | None = None,
    cache: epath.PathLike | None = None,
) -> Evaluation:
    """Judges one set of samples. To judge several against one reference, make a `metrics.judge.Judge`.

    Args:
        samples: uint8 [N, H, W, 3], an .npz of such or of ADM's statistics, a folder of pictures, a dataset directory, or an
            `ImageSet`.
        reference: the same.
        features: "lite0" or "inception".
        weights: the user's file of Inception weights.
        batch_size: images per call of the network, over all devices.
        gallery: labelled images for the nearest-neighbour accuracy.
        patch_size: side of the model's patches, for the step across their borders; None leaves that number out.
        cache: folder for the statistics of the reference.

    Raises:
        UserError: a file is missing, malformed or does not fit the others; before anything is compiled.
    """
    drawn = inputs.sample_set(samples)
    size = drawn.image_shape[0] if isinstance(drawn, ImageSet) else None
    against = inputs.reference_set(reference, image_size=size)
    network = feature_networks.open_network(features, weights)
    judge = Judge(network, against, gallery=gallery, batch_size=batch_size, patch_size=patch_size, cache=cache)
    verdict = judge(drawn)
    sampling = sample_files.read_settings(samples) if isinstance(samples, str | os.PathLike) else {}
    return Evaluation(verdict.metrics, judge.protocol(), verdict.notes, sampling)


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    own = {"flag_values": flags}
    absl_flags.DEFINE_multi_string(
        "samples", None, ".npz, folder of pictures or dataset directory; given several times, a row each", **own
    )
    absl_flags.DEFINE_string("workdir", None, "instead: a run, whose weights draw the samples", **own)
    absl_flags.DEFINE_string(
        "reference", None, "what to compare with; with --workdir by default the config's eval.reference", **own
    )
    absl_flags.DEFINE_string("features", None, "inception or lite0; default: with --workdir the config's, else lite0", **own)
    absl_flags.DEFINE_string("weights", None, "file of Inception weights; default: with --workdir the config's", **own)
    absl_flags.DEFINE_string("out", None, "FILE.json; with --workdir by default WORKDIR/evaluation.json", **own)
    absl_flags.DEFINE_integer(
        "batch_size", None, "images per call of the feature network; default: with --workdir the config's, else 50", **own
    )
    absl_flags.DEFINE_integer(
        "patch_size",
        None,
        "with --samples: side of the model's patches, for `border`, the step across their borders over that inside; "
        "with --workdir the config's",
        lower_bound=2,
        **own,
    )
    absl_flags.DEFINE_integer("num_samples", None, "with --workdir: samples per row; default: the config's", **own)
    absl_flags.DEFINE_integer("seed", 0, "with --workdir: seed of the samples", **own)
    absl_flags.DEFINE_float("ema_decay", None, "with --workdir: of several averages the one with this decay", **own)
    absl_flags.DEFINE_bool("quick", False, "with --workdir: leave out the row of the raw (not averaged) weights", **own)
    absl_flags.DEFINE_enum("precision", "default", ("default", "highest"), "highest: float32 throughout", **own)
    absl_flags.DEFINE_string("cache", kept.default_folder(), "folder for the statistics of references; empty keeps none", **own)
    command_line.define_processes(flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command. Of several hosts all draw; the first alone judges and writes while the others wait."""
    if bool(flags.workdir) == all(flags.samples or [""]):  # an empty name is none
        raise UserError("name one of --samples=FILE.npz (or a folder) and --workdir=DIR")
    storage.require_no_hub(flags.workdir or "", flag="--workdir")
    command_line.refuse(flags, *(["patch_size"] if flags.workdir else ["num_samples", "seed", "quick", "ema_decay"]))
    if flags.out is not None:
        storage.require_file_name(flags.out, flag="--out", suffix=".json")
    distributed.start()
    precision = "highest" if flags.precision == "highest" else None
    with stopping_at_once(), jax.default_matmul_precision(precision):
        try:
            _judge_workdir(flags) if flags.workdir else distributed.on_main(lambda: _judge_files(flags))
        except KeyboardInterrupt:
            raise Interrupted("stopped, nothing was written; the same command starts again", code=Exit.INTERRUPTED) from None


def _judge_files(flags: absl_flags.FlagValues) -> None:
    """A row for each --samples; all are opened, and held against the reference's size, before the first is judged."""
    if not flags.reference:
        raise UserError("--reference is missing: name an .npz, a folder of pictures or a dataset directory to compare with")
    sets = [inputs.sample_set(path) for path in flags.samples]
    shapes = {samples.name: samples.image_shape for samples in sets if isinstance(samples, ImageSet)}
    first = dict(zip(("name", "image_shape"), next(iter(shapes.items()), (sets[0].name, None)), strict=True))
    options = {"patch_size": flags.patch_size, "cache": flags.cache or None, "watched": inputs.with_progress}
    judge = open_judge(_wanted(flags, config.Eval()), **first, **options)
    for samples in sets:
        judge.require_fit(samples)
    rows, notes, sampling = [], [], {}
    for name, path, samples in zip(inputs.row_names(flags.samples), flags.samples, sets, strict=True):
        verdict = judge(inputs.with_progress(samples))
        rows.append({"row": name} | verdict.metrics)
        notes += [note for note in verdict.notes if note not in notes]
        sampling[name] = sample_files.read_settings(path)
    _tell(rows, judge.protocol(), notes, sampling, out=flags.out)


def _wanted(flags: absl_flags.FlagValues, base: config.Eval) -> config.Eval:
    """The run's `eval` section with what the command line names; weights go with their network."""
    named = {key: flags[key].value for key in ("reference", "features", "weights", "batch_size", "num_samples")}
    if flags.features not in (None, base.features):
        named["weights"] = flags.weights or ""
    return dataclasses.replace(base, **{key: value for key, value in named.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What samples of a workdir are held against, on the host that judges."""

    judge: Judge
    real: ImageSet | None  # training images, where they are at hand
    class_names: Sequence[str]
    notes: list[str]


def _open_bench(flags: absl_flags.FlagValues, run: config.Config, known: Sequence[str]) -> _Bench:
    wanted = _wanted(flags, run.eval)
    if not wanted.reference:
        raise UserError("--reference is missing and the run's config names none (eval.reference): name an .npz or a dataset")
    size, notes, train = run.model.image_size[0], [], None
    if run.data.path:
        try:
            train = prepared.open_dataset(run.data.path, image_size=size, source=run.data.source)
        except UserError as error:
            notes.append(f"No row of real images and no nearest neighbour: {error}.")
    gallery = inputs.dataset_images(train, count=GALLERY) if train and train.num_classes <= _MOST_CLASSES else None
    shape = {"name": "this run", "image_shape": (*run.model.image_size, 3), "patch_size": run.model.patch_size}
    watched = gallery and inputs.with_progress(gallery)
    judge = open_judge(wanted, **shape, gallery=watched, cache=flags.cache or None, watched=inputs.with_progress)
    real = inputs.dataset_images(train, count=wanted.num_samples, phase=0.5) if train else None
    names = train.classes if train else known or [f"class {i}" for i in range(run.model.num_classes)]
    return _Bench(judge, real, names, notes)


def _rows_of(path: epath.Path, record: checkpoint.Record, *, average: str, quick: bool) -> list[str]:
    """Which weights a step offers, the `average` last: what `convert` wrote was not trained here and has the average alone."""
    rows = ["initial"] if record.data else []
    return rows + (["raw"] if (path / "state").exists() and not quick else []) + [average]


def _judge_workdir(flags: absl_flags.FlagValues) -> None:
    """A row each for real images, the network at step 0, the last weights and their average; and the report."""
    distributed.say(f"reading the newest checkpoint of {flags.workdir}")
    decay = flags.ema_decay
    average = "ema" if decay is None else averages.find(flags.workdir, decay, report=distributed.say)
    unread = averages.UNREAD[average] if flags.quick else [name for name in averages.NAMES if name != average]
    path = directories.find(flags.workdir, verify=True, report=distributed.say, unread=unread)
    record = checkpoint.read_record(path)
    run = record.config
    names = report.titles(run, average, decay)
    count = _wanted(flags, run.eval).num_samples
    weights_of = _rows_of(path, record, average=average, quick=flags.quick)
    distributed.say(f"step {path.name}: {count} samples each of {', '.join(names[weights] for weights in weights_of)}")
    bench = distributed.on_main(lambda: _open_bench(flags, run, record.classes))
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    shown: dict[str, list[tuple[np.ndarray, int]]] = {"real": []}

    def judge(name: str, images: ImageSet) -> None:
        shown[name] = []
        verdict = bench.judge(inputs.with_progress(inputs.keeping(images, shown[name])))
        rows.append({"row": images.name} | verdict.metrics)
        notes.extend(note for note in verdict.notes if note not in notes)

    if bench and bench.real:
        judge("real", dataclasses.replace(bench.real, name=_REAL))
    distributed.agree(0)  # hosts draw together, so they start together
    drawn = {"seed": flags.seed, "options": run.sample}
    for weights in weights_of:
        dtype = "float32" if flags.precision == "highest" else None
        try:
            model, params = checkpoint.load(path, weights=weights, dtype=dtype, verify=False)
        except UserError as error:
            if weights != "initial":
                raise
            notes.append(f"No row of the run as it began: {error}.")  # the model that it began with is gone
            continue
        samples = inputs.drawn_samples(model, params, count=count, name=names[weights], **drawn)
        if bench:
            judge(weights, samples)
        else:
            collections.deque(samples.batches(count), maxlen=0)  # this host draws its part, the first one judges
        distributed.agree(0)
    if bench:
        drawing = {"samples": samples, "model": model, "params": params}
        _write_workdir(flags, run, bench, rows, notes + bench.notes, step=path.name, shown=shown, **drawing)
    distributed.agree(0)  # the others wait for the one that writes


def _write_workdir(flags, run, bench, rows, notes, *, step, shown, samples, model, params) -> None:
    """The table and the report; `shown` holds pictures by row, `samples` is the last row's set, drawn from `params`."""
    workdir = storage.absolute(flags.workdir)
    nfe = dict(zip(("conditional", "unconditional"), sampler.nfe(run.sample), strict=True))
    how = {"nfe": nfe, "seed": flags.seed, "step": step, "dtype": model.config.dtype}
    settings, protocol = dataclasses.asdict(run.sample) | how, bench.judge.protocol()
    sampling = {row["row"]: settings for row in rows if row["row"] != _REAL}
    _tell(rows, protocol, notes, sampling, out=flags.out or workdir / "evaluation.json")
    labels = samples.labels[:_FRAMES]
    file = report.write_report(
        workdir / "report.html",
        title="DiP",
        samples=inputs.pictures(shown[list(shown)[-1]]),
        real=inputs.pictures(shown["real"]),
        class_names=bench.class_names,
        trajectory=trajectories.draw_frames(model, params, labels=labels, seed=flags.seed, options=run.sample),
        history=writers.read_rows(workdir / "metrics.jsonl"),
        metrics=rows,
        config=run,
        notes=[*notes, *console.behind(protocol, sampling)],
    )
    distributed.say(f"wrote {file}")


def _tell(rows: Sequence[Mapping], protocol: Mapping, notes: Sequence[str], sampling: Mapping, *, out: Any) -> None:
    """Prints the table and, in short lines, what is behind it; writes the whole as JSON. `sampling` is by row."""
    for line in [*console.table(rows), "", *console.behind(protocol, sampling), *notes]:
        print(line)
    if out is not None:
        values = {"rows": list(rows), "protocol": protocol, "sampling": sampling, "notes": list(notes)}
        storage.write_text(storage.absolute(out), json.dumps(values, indent=1) + "\n")
        print(f"wrote {out}")
