"""Find the sampling options to publish with: averages x guidance x interval x steps x shift x solver, from one checkpoint.

Examples:
  python -m dip_jax sweep --workdir=runs/demo --guidance=2,3,4,5 --interval=0:0.7 --interval=0:1 --num_samples=500
  python -m dip_jax sweep --workdir=runs/xl --guidance=2.5,2.9,3.3 --interval=0.1:1 --num_samples=5000 --confirm \\
      --confirm_samples=50000 --confirm_seeds=1,2,3

What is not named is as in the config; all averages that the run kept (optim.ema_decays) are swept, with --raw the last
update's weights too. All points have the same noise, and features of the reference are taken once. A point whose first
quarter has more than --cut times the lowest FID of the first quarters of the points before it is not drawn to its end. DIR
(--out) gets sweep.csv, sweep.json and sweep.png.

A killed sweep goes on where it stopped when the same command is given again, and ends with the same table to the byte. With
--confirm the point of the lowest FID is drawn again with other seeds and more samples: the lowest of many estimates is too low,
so publish that number. One process, with all its devices.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from dip_jax import config
from dip_jax.checkpoints import averages, checkpoint, directories, manifest
from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.metrics import cache as kept
from dip_jax.metrics import inputs, sweep
from dip_jax.metrics.judge import Judge, open_judge
from dip_jax.metrics.sweep import Point, Row
from dip_jax.metrics.sweeping import Bench, Task
from dip_jax.models import dip
from dip_jax.reporting import console, sweep_picture
from dip_jax.runtime import command_line, distributed, storage
from dip_jax.runtime.lock import Lock
from dip_jax.runtime.signals import stopping_at_once
from dip_jax.sampling import protocol, sample_files, trajectories

_LISTS = {"guidance": float, "steps": int, "t_shift": float, "solver": str}


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The command's flags."""
    own = {"flag_values": flags}
    absl_flags.DEFINE_string("workdir", None, "run whose newest checkpoint is used", **own)
    absl_flags.DEFINE_string("checkpoint", None, "instead: one step directory, or what `convert` wrote", **own)
    absl_flags.DEFINE_string("out", None, "directory for the tables and what is half done; default: WORKDIR/sweep", **own)
    absl_flags.DEFINE_string("guide", None, "workdir or step that guides all points in the place of no class", **own)
    absl_flags.DEFINE_list("ema_decays", None, "averages of the weights; default: all that the run kept", **own)
    absl_flags.DEFINE_bool("raw", False, "the last update's weights too", **own)
    absl_flags.DEFINE_list("guidance", None, "guidance scales; default: the run's config, as for the next four", **own)
    absl_flags.DEFINE_multi_string("interval", None, "low:high, where guidance applies; given several times", **own)
    absl_flags.DEFINE_list("steps", None, "steps of the solver", **own)
    absl_flags.DEFINE_list("t_shift", None, "time shifts", **own)
    absl_flags.DEFINE_list("solver", None, "of euler, heun, ab2 and sde", **own)
    absl_flags.DEFINE_integer("num_samples", 1000, "samples of a point", lower_bound=8, **own)
    absl_flags.DEFINE_integer("seed", 0, "of the noise that all points share", **own)
    absl_flags.DEFINE_integer("batch_size", None, "images drawn at once; default: the run's config", **own)
    absl_flags.DEFINE_float("cut", 1.5, "how many times the lowest FID is clearly worse; 0 cuts nothing short", **own)
    absl_flags.DEFINE_bool("confirm", False, "draw the best point again, with other seeds and more samples", **own)
    absl_flags.DEFINE_integer("confirm_samples", None, "samples of each seed; default: the config's eval.num_samples", **own)
    absl_flags.DEFINE_list("confirm_seeds", ["1", "2", "3"], "seeds other than --seed", **own)
    absl_flags.DEFINE_string("reference", None, "what to compare with; default: the config's eval.reference", **own)
    absl_flags.DEFINE_string("features", None, "inception or lite0; default: the config's", **own)
    absl_flags.DEFINE_string("weights", None, "file of Inception weights; default: the config's", **own)
    absl_flags.DEFINE_string("cache", kept.default_folder(), "folder for the statistics of references; empty keeps none", **own)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    if (flags.workdir is None) == (flags.checkpoint is None):
        raise UserError("name one of --workdir=DIR and --checkpoint=DIR")
    if flags.out is None and flags.workdir is None:
        raise UserError("--out=DIR is missing: where the tables go")
    if flags.cut and flags.cut <= 1:
        raise UserError(f"--cut={flags.cut} must be above 1, or 0 to cut nothing short")
    seeds = [command_line.number(int, "confirm_seeds", text) for text in flags.confirm_seeds]
    if flags.confirm and (flags.seed in seeds or len(set(seeds)) != len(seeds)):
        raise UserError(
            f"--confirm_seeds={','.join(flags.confirm_seeds)} must differ from each other and from --seed={flags.seed}"
        )
    out = storage.absolute(flags.out or storage.absolute(flags.workdir) / "sweep")
    storage.require_folder_name(out, flag="--out")
    path = directories.find(
        flags.workdir or flags.checkpoint, verify=True, report=distributed.say, unread=averages.UNREAD["initial"]
    )
    record = checkpoint.read_record(path)
    if flags.raw and not (path / "state").is_dir():
        raise UserError(f"--raw: {path} holds averaged weights alone, not the last update's")
    points = _points(flags, record.config)
    guide = _open_guide(flags, record.config)
    judge = _open_judge(flags, record.config)
    settings = {
        "step": path.name,
        "manifest": storage.file_digest(path / manifest.find_manifest(path)),
        "points": [point.name for point in points],
        **{key: flags[key].value for key in ("num_samples", "seed", "cut")},
        "batch_size": points[0].options.batch_size,
        **({"guide": protocol.digest(guide.params)} if guide else {}),
    }
    sample_files.require_folder(out)
    lock = Lock(out)
    lock.acquire()
    try:
        with stopping_at_once():
            settings |= judge.protocol()  # takes the features of the reference, once
            sample_files.claim(out / "settings.json", settings, begun=(out / "results.json").exists(), out=out)
            bench = Bench(out, judge, step=path, guide=guide)
            rows = _sweep(bench, points, settings)
            if flags.confirm:
                chosen = next(point for point in points if point.name == sweep.best(rows))
                count = flags.confirm_samples or record.config.eval.num_samples
                _confirm(bench, chosen, settings, seeds=seeds, count=count)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it stopped", code=Exit.INTERRUPTED) from None
    finally:
        lock.release()


def _points(flags: absl_flags.FlagValues, run: config.Config) -> list[Point]:
    """The grid that the command line asks for."""
    base = run.sample
    if flags.batch_size is not None:
        base = dataclasses.replace(base, batch_size=flags.batch_size)
    axes: dict[str, Sequence[Any]] = {name: [getattr(base, name)] for name in (*_LISTS, "interval")}
    for name, kind in _LISTS.items():
        if flags[name].value is not None:
            axes[name] = [command_line.number(kind, name, text) for text in flags[name].value]
    if flags.interval is not None:
        axes["interval"] = [_interval(text) for text in flags.interval]
    kept_decays = run.optim.ema_decays
    decays = kept_decays
    if flags.ema_decays is not None:
        decays = [command_line.number(float, "ema_decays", text) for text in flags.ema_decays]
    weights = [(averages.name_of(decay, kept_decays), f"ema {decay:g}") for decay in decays]
    weights += [("raw", "raw")] * flags.raw
    return sweep.grid(weights, base, **axes)


def _interval(text: str) -> tuple[float, float]:
    ends = text.replace(",", ":").split(":")
    if len(ends) != 2:
        raise UserError(f"--interval={text} must be low:high, such as 0.1:1")
    low, high = (command_line.number(float, "interval", end) for end in ends)
    return low, high


def _open_guide(flags: absl_flags.FlagValues, run: config.Config) -> trajectories.Weaker | None:
    """The model of --guide, once it is seen to fit."""
    if flags.guide is None:
        return None
    guide = trajectories.Weaker(*checkpoint.load(flags.guide, dtype=run.model.dtype))
    guide.require_fit(dip.from_config(run.model))
    return guide


def _open_judge(flags: absl_flags.FlagValues, run: config.Config) -> Judge:
    named = {key: flags[key].value for key in ("reference", "features", "weights")}
    if flags.features not in (None, run.eval.features):
        named["weights"] = flags.weights or ""
    wanted = dataclasses.replace(run.eval, **{key: value for key, value in named.items() if value is not None})
    if not wanted.reference:
        raise UserError("--reference is missing and the run's config names none (eval.reference): name an .npz or a dataset")
    shape = {"name": "this run", "image_shape": (*run.model.image_size, 3), "patch_size": run.model.patch_size}
    return open_judge(wanted, **shape, cache=flags.cache or None, watched=inputs.with_progress)


def _sweep(bench: Bench, points: Sequence[Point], settings: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of all points by name, drawn where they are not there yet; and the tables and the picture of them."""
    drawn = {"seed": settings["seed"], "count": settings["num_samples"]}
    rows = bench.rows([Task(point.name, point, **drawn) for point in points], cut=settings["cut"])
    table = list(rows.values())
    _write(bench, "sweep", table, settings)
    fid = sweep.fid_name(table[0])
    picture = sweep_picture.draw(table, fid=fid, inception=fid.replace("fid", "is", 1))
    storage.write_bytes(bench.out / "sweep.png", picture)
    best = rows[sweep.best(rows)]
    print(f"lowest {fid} of {len(rows)} points: {best[fid]:.4g}, {_words(best)}; --confirm draws it again with other seeds")
    return rows


def _confirm(bench: Bench, point: Point, settings: Mapping[str, Any], *, seeds: Sequence[int], count: int) -> None:
    """The best point with other seeds and all samples: the number to publish."""
    tasks = [Task(f"confirm_{point.name}_{count}_seed{seed}", point, seed=seed, count=count) for seed in seeds]
    rows = list(bench.rows(tasks, cut=0.0).values())
    _write(bench, "confirm", rows, settings)
    spreads = sweep.spreads(rows)
    told = f"mean ± standard deviation (range) over {len(rows)} seed{'s' * (len(rows) > 1)}, {count} samples each"
    print(f"\nto publish, {told}; {_words(rows[0])}:")
    for line in console.aligned({name: str(spread) for name, spread in spreads.items()}):
        print(line)
    print(f"chosen among {len(settings['points'])} points by {settings['num_samples']} samples with seed {settings['seed']}")


def _write(bench: Bench, name: str, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    storage.write_text(bench.out / f"{name}.csv", sweep.csv_text(rows))
    values = {"rows": list(rows), "notes": bench.notes, "settings": dict(settings), "rule": sweep.__doc__}
    storage.write_text(bench.out / f"{name}.json", json.dumps(values, indent=1) + "\n")
    for line in [*console.table(rows), *bench.notes, f"wrote {bench.out / name}.csv and .json"]:
        print(line)


def _words(row: Row) -> str:
    return (
        f"{row['weights']}, guidance {row['guidance']:g} where {row['low']:g} < t < {row['high']:g}, {row['solver']}, "
        f"{row['steps']} steps, shift {row['t_shift']:g}, {row['per_class']} per class"
    )
