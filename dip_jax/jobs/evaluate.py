"""Judge samples: FID, sFID, Inception Score, precision, recall, and the protocol behind the numbers.

Examples:
  python -m dip_jax evaluate --workdir=runs/demo                             draws samples, compares, writes report.html
  python -m dip_jax evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --features=inception \\
      --weights=classify_image_graph_def.pb --out=metrics.json               the ADM protocol
  python -m dip_jax evaluate --samples=samples.npz --reference=datasets/photo_crops/validation --features=lite0

--samples takes an .npz from any framework: arr_0 uint8 [N, H, W, 3] and, for the nearest neighbour, labels arr_1 [N].
--reference takes an ADM .npz, an .npz of images, or a dataset directory that `prepare` made.
Metrics of features=lite0, whose weights a Python package ships, are named so (fid_lite0): they rank models on one dataset
and compare with no published number.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags
from etils import epath
from tqdm import tqdm

from dip_jax import candidates, checkpoint, config, drawing, figures, guard, report, sample_files, sampler, steps, writers
from dip_jax.data import pipeline
from dip_jax.distributed import say
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.metrics import features as feature_networks
from dip_jax.metrics import image_sets
from dip_jax.metrics.image_sets import ImageSet, ReferenceFile
from dip_jax.metrics.judge import Judge

GALLERY = 2000  # training images among which the nearest neighbour of a sample is looked up
_MOST_CLASSES = 100  # with more, the gallery holds too few images of a class
_SHOWN = 8  # samples and training images of a class that the report shows
_MOST_SHOWN = 2000
_ROWS = {"initial": "untrained (step 0)", "raw": "last weights", "ema": "averaged weights (EMA)"}
_FRAMES = 4  # samples in the report's trajectory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Numbers, and how they were taken.

    Attributes:
        metrics: by name, with "N"; names end in the feature network's suffix.
        protocol: JSON values.
        notes: sentences that a reader of the numbers needs.
    """

    metrics: dict[str, float | int]
    protocol: dict[str, Any]
    notes: list[str]


def evaluate(
    samples: ImageSet | np.ndarray | str | os.PathLike,
    reference: ImageSet | ReferenceFile | np.ndarray | str | os.PathLike,
    *,
    features: str = "lite0",
    weights: str = "",
    batch_size: int = 50,
    gallery: ImageSet | None = None,
    cache: epath.PathLike | None = None,
) -> Evaluation:
    """Judges one set of samples. To judge several against one reference, make a `metrics.judge.Judge`.

    Args:
        samples: uint8 [N, H, W, 3], an .npz of such, or an `ImageSet`.
        reference: the same, an ADM reference .npz, or a dataset directory.
        features: "lite0" or "inception".
        weights: the user's file of Inception weights.
        batch_size: images per call of the network, over all devices.
        gallery: labelled images for the nearest-neighbour accuracy.
        cache: folder for the statistics of the reference.

    Raises:
        UserError: a file is missing, malformed or does not fit the others; before anything is compiled.
    """
    drawn = _sample_set(samples)
    network = feature_networks.open_network(features, weights)
    against = _reference_set(reference, image_size=drawn.image_shape[0])
    judge = Judge(network, against, gallery=gallery, batch_size=batch_size, cache=cache)
    return Evaluation(judge(drawn), judge.protocol(), judge.notes(drawn.count))


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    own = {"flag_values": flags}
    absl_flags.DEFINE_string("samples", None, "FILE.npz of samples from any framework: arr_0 uint8 [N,H,W,3]", **own)
    absl_flags.DEFINE_string("workdir", None, "instead: a run, whose weights draw the samples", **own)
    absl_flags.DEFINE_string("reference", None, "FILE.npz or dataset directory; with --workdir by default the run's own", **own)
    absl_flags.DEFINE_string("features", None, "inception or lite0; default: the run's config, else lite0", **own)
    absl_flags.DEFINE_string("weights", None, "file of Inception weights; default: the run's config", **own)
    absl_flags.DEFINE_string("out", None, "FILE.json; with --workdir by default WORKDIR/evaluation.json", **own)
    absl_flags.DEFINE_integer("batch_size", None, "images per call of the feature network; default: the config's", **own)
    absl_flags.DEFINE_integer("num_samples", None, "with --workdir: samples per row; default: the run's config", **own)
    absl_flags.DEFINE_integer("seed", 0, "with --workdir: seed of the samples", **own)
    absl_flags.DEFINE_bool("quick", False, "with --workdir: leave out the row of the raw (not averaged) weights", **own)
    absl_flags.DEFINE_enum("precision", "default", ("default", "highest"), "highest: float32 throughout", **own)
    absl_flags.DEFINE_string("cache", _default_cache(), "folder for the statistics of references", **own)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    if (flags.workdir is None) == (flags.samples is None):
        raise UserError("name one of --samples=FILE.npz and --workdir=DIR")
    with jax.default_matmul_precision("highest" if flags.precision == "highest" else None):
        try:
            _judge_workdir(flags) if flags.workdir else _judge_file(flags)
        except KeyboardInterrupt:
            raise Interrupted("stopped, nothing was written; the same command starts again", code=Exit.INTERRUPTED) from None


def _judge_file(flags: absl_flags.FlagValues) -> None:
    if flags.reference is None:
        raise UserError("--reference is missing: name an .npz or a dataset directory to compare with")
    found = evaluate(
        _with_progress(_sample_set(flags.samples)),
        flags.reference,
        features=flags.features or config.Eval().features,
        weights=flags.weights or "",
        batch_size=flags.batch_size or config.Eval().batch_size,
        cache=flags.cache,
    )
    sampling = sample_files.read_settings(flags.samples)
    _tell([{"row": os.path.basename(flags.samples)} | found.metrics], found.protocol, found.notes, sampling, out=flags.out)


def _judge_workdir(flags: absl_flags.FlagValues) -> None:
    """A row each for real images, the untrained network, the last weights and their average; and the report."""
    path = steps.find(flags.workdir, verify=True, report=say)
    workdir, run_config = guard.absolute(flags.workdir), checkpoint.read_record(path).config
    wanted = run_config.eval
    reference = flags.reference or wanted.reference
    if not reference:
        raise UserError("--reference is missing and the run's config names none (eval.reference): name an .npz or a dataset")
    features = flags.features or wanted.features
    weights = flags.weights or (wanted.weights if features == wanted.features else "")
    network = feature_networks.open_network(features, weights)
    size, data = run_config.model.image_size[0], run_config.data
    train = pipeline.open_dataset(data.path, image_size=size, source=data.source)
    gallery = candidates.dataset_images(train, count=GALLERY) if train.num_classes <= _MOST_CLASSES else None
    batch_size = flags.batch_size or wanted.batch_size
    against = _reference_set(reference, image_size=size)
    judge = Judge(network, against, gallery=gallery, batch_size=batch_size, cache=flags.cache)
    count = flags.num_samples or wanted.num_samples
    real = candidates.dataset_images(train, count=count, phase=0.5)
    drawn = {"seed": flags.seed, "options": run_config.sample}
    shown_real: list[np.ndarray] = []
    rows = [{"row": "real training images"} | judge(_keeping(real, shown_real))]
    for weights in ("initial", "ema") if flags.quick else ("initial", "raw", "ema"):
        model, params = checkpoint.load(path, weights=weights, verify=False)
        samples = candidates.drawn_samples(model, params, count=count, name=_ROWS[weights], **drawn)
        shown: list[np.ndarray] = []  # in the end, the EMA's
        rows.append({"row": samples.name} | judge(_with_progress(_keeping(samples, shown))))
    sampling = _sampling(run_config, seed=flags.seed, step=path.name)
    out = flags.out or workdir / "evaluation.json"
    _tell(rows, judge.protocol(), judge.notes(count), sampling, out=out)
    file = report.write_report(
        workdir / "report.html",
        title="DiP",
        samples=_pictures(shown, samples),
        real=_pictures(shown_real, real),
        class_names=train.classes,
        trajectory=drawing.draw_frames(model, params, labels=samples.labels[:_FRAMES], **drawn),
        history=writers.read_rows(workdir / "metrics.jsonl"),
        metrics=rows,
        config=run_config,
        notes=[*judge.notes(count), *_notes(judge.protocol(), sampling)],
    )
    say(f"wrote {file}")


def _sampling(run: config.Config, *, seed: int, step: str) -> dict[str, Any]:
    conditional, unconditional = sampler.nfe(run.sample)
    return dataclasses.asdict(run.sample) | {
        "nfe": f"{conditional}+{unconditional}",
        "seed": seed,
        "step": step,
        "dtype": run.model.dtype,
    }


def _keeping(images: ImageSet, shown: list[np.ndarray]) -> ImageSet:
    """The same set; its first images are kept in `shown` as they pass, enough of every class for the report."""
    room = min(_SHOWN * len(np.unique(images.labels)), _MOST_SHOWN)

    def batches(size: int) -> Iterator[np.ndarray]:
        for batch in images.batches(size):
            missing = room - sum(map(len, shown))
            if missing > 0:
                shown.append(batch[:missing].copy())
            yield batch

    return dataclasses.replace(images, batches=batches)


def _pictures(shown: Sequence[np.ndarray], images: ImageSet) -> figures.Labelled:
    """What `_keeping` kept of `images`."""
    return figures.Labelled(np.concatenate(shown), images.labels[: sum(map(len, shown))])


def _with_progress(images: ImageSet) -> ImageSet:
    def batches(size: int) -> Iterator[np.ndarray]:
        with tqdm(total=images.count, unit=" images", desc=images.name, disable=None) as bar:
            for batch in images.batches(size):
                yield batch
                bar.update(len(batch))

    return dataclasses.replace(images, batches=batches)


def _sample_set(samples: Any) -> ImageSet:
    if isinstance(samples, ImageSet):
        return samples
    return image_sets.from_array(samples) if isinstance(samples, np.ndarray) else image_sets.from_npz(samples)


def _reference_set(reference: Any, *, image_size: int) -> ImageSet | ReferenceFile:
    if isinstance(reference, ImageSet | ReferenceFile):
        return reference
    if isinstance(reference, np.ndarray):
        return image_sets.from_array(reference)
    if os.fspath(reference).endswith(".npz"):
        return image_sets.read_reference(reference)
    return candidates.dataset_images(pipeline.open_dataset(reference, image_size=image_size))


def _tell(rows: Sequence[Mapping], protocol: Mapping, notes: Sequence[str], sampling: Mapping, *, out: Any) -> None:
    """Prints the table and what is behind it, and writes both as JSON."""
    columns = {key: [key, *(_text(row.get(key)) for row in rows)] for key in rows[0]}
    widths = {key: max(map(len, cells)) for key, cells in columns.items()}
    for line in range(len(rows) + 1):
        cells = (
            cells[line].ljust(widths[key]) if key == "row" else cells[line].rjust(widths[key]) for key, cells in columns.items()
        )
        print("  ".join(cells))
    for line in [*notes, *_notes(protocol, sampling)]:
        print(line)
    if out is not None:
        values = {"rows": list(rows), "protocol": protocol, "sampling": sampling, "notes": list(notes)}
        guard.write_text(guard.absolute(out), json.dumps(values, indent=1) + "\n")
        print(f"wrote {out}")


def _notes(protocol: Mapping[str, Any], sampling: Mapping[str, Any]) -> list[str]:
    lines = ["Protocol: " + ", ".join(f"{key}={value}" for key, value in protocol.items() if value not in (None, "")) + "."]
    return lines + ["Sampling: " + ", ".join(f"{key}={value}" for key, value in sampling.items()) + "."] if sampling else lines


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def _default_cache() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dip_jax")
