"""The options of docs/objective.md and their useful pairs against plain: equal steps, three seeds, two training lengths."""

import dataclasses
import math
import pathlib
import statistics
from typing import Any

import jax

from benchmarks.paper import measure, plots, seeds, tables
from benchmarks.paper.scale import Scale, photo_crops_config
from benchmarks.paper.session import Session
from dip_jax.checkpoints import directories
from dip_jax.config import Checkpoint, Config
from dip_jax.models import dip
from dip_jax.training import workload

QUALITY, TIMES, VERDICTS = "options.csv", "options_times.csv", "options_verdicts.csv"
METRICS = ("loss", "fid_lite0")

INTERNAL = {"model": {"internal": True}}
CONTEXT = {"model": {"context_tokens": 4}}  # a quarter of the 16 tokens, as 32 are an eighth of 256
FREQUENCY = {"flow": {"frequency_weight": 1.0}}
GUIDED = {"sample": {"internal_guidance": 1.4}}

Options = dict[str, dict[str, Any]]


def together(*options: Options) -> Options:
    """Several options as one: fields by section."""
    merged: Options = {}
    for each in options:
        for section, fields in each.items():
            merged[section] = merged.get(section, {}) | fields
    return merged


# Two rows that differ in `sample` alone share their runs.
VARIANTS: dict[str, Options] = {
    "plain": {},
    "second output, unused": INTERNAL,
    "internal guidance": together(INTERNAL, GUIDED),
    "in-context tokens": CONTEXT,
    "frequency-weighted": FREQUENCY,
    "rank-8 prediction": {"model": {"prediction": "asym"}},
    "internal + tokens": together(INTERNAL, GUIDED, CONTEXT),
    "internal + frequency": together(INTERNAL, GUIDED, FREQUENCY),
    "tokens + frequency": together(CONTEXT, FREQUENCY),
}


def trained(scale: Scale, options: Options, *, seed: int, data: str) -> Config:
    """The run of a variant. The learning rate is constant, so that half the way is a run of half the length."""
    base = photo_crops_config(scale, seed=seed, data=data, **options.get("model", {}))
    return dataclasses.replace(
        base,
        flow=dataclasses.replace(base.flow, **options.get("flow", {})),
        optim=dataclasses.replace(base.optim, schedule="constant"),
        checkpoint=Checkpoint(every_steps=scale.steps // 2, keep_last=1, keep_every=scale.steps // 2),
    )


def run_name(options: Options, *, seed: int) -> str:
    """The workdir: by what is trained."""
    words = [f"{key}={value}" for section in ("model", "flow") for key, value in sorted(options.get(section, {}).items())]
    return "_".join(["options", *words, f"seed={seed}"])


def compute(session: Session) -> None:
    """Trains all variants with all seeds, seed by seed; writes the rows of every finished run."""
    data, scale = session.photo_crops(), dataclasses.replace(session.scale, **session.scale.options)
    session.expect(len(VARIANTS) * len(scale.seeds))
    configs = {name: trained(scale, options, seed=0, data=str(data / "train")) for name, options in VARIANTS.items()}
    seconds = session.once(session.work / "options_step_seconds.json", lambda: measure.step_seconds(configs))
    flops = {name: workload.step_flops(config.model, None) for name, config in configs.items()}
    rows = [
        {
            "variant": name,
            "step_seconds": seconds[name],
            "time_ratio": seconds[name] / seconds["plain"],
            "flops_ratio": flops[name] / flops["plain"],
            "parameters_ratio": _parameters(configs[name]) / _parameters(configs["plain"]),
        }
        for name in VARIANTS
    ]
    tables.write(session.out / TIMES, rows)
    rows = []
    for seed in scale.seeds:
        for name, options in VARIANTS.items():
            drawn = dataclasses.replace(scale, sample=dataclasses.replace(scale.sample, **options.get("sample", {})))

            def lengths(workdir: pathlib.Path, drawn: Scale = drawn) -> list[dict]:
                root = workdir / directories.ROOT
                return [{"steps": n} | measure.quality(root / str(n), drawn, data) for n in (scale.steps // 2, scale.steps)]

            lengths.__name__ = "_".join(["lengths", *(f"{k}={v}" for k, v in options.get("sample", {}).items())])
            config = trained(scale, options, seed=seed, data=str(data / "train"))
            found = session.run(run_name(options, seed=seed), config, lengths)
            rows += [{"variant": name, "seed": seed} | row for row in found]
            tables.write(session.out / QUALITY, rows)
            tables.write(session.out / VERDICTS, verdicts(rows))


def _parameters(config: Config) -> int:
    return workload.count(jax.eval_shape(dip.from_config(config.model).init, jax.random.key(0)))


def verdicts(rows: list[dict]) -> list[dict]:
    """Each variant against plain with the same seed and steps: mean, spread over seeds, and a paired t-test in words."""
    found = []
    for (variant, steps), group in plots.by(rows, "variant", "steps").items():
        for metric in METRICS:
            plain = {row["seed"]: row[metric] for row in rows if (row["variant"], row["steps"]) == ("plain", steps)}
            values = [row[metric] for row in group]
            differences = [row[metric] - plain[row["seed"]] for row in group]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            row = {"variant": variant, "steps": steps, "metric": metric, "seeds": len(values)}
            row |= {"mean": statistics.fmean(values), "spread": spread, "difference": statistics.fmean(differences)}
            found.append(row | {"verdict": "" if variant == "plain" else seeds.judge(differences)})
    return found


def plot(out: pathlib.Path) -> None:
    """A row per variant, a column per length and metric; a dot per seed."""
    groups = plots.by(tables.read(out / QUALITY), "steps", "variant")
    lengths = sorted({steps for steps, _ in groups})
    made = plots.figure(13, 4.6)
    axes = made.subplots(1, len(lengths) * len(METRICS), sharey=True)
    columns = [(metric, steps) for metric in METRICS for steps in lengths]
    for axis, (metric, steps) in zip(axes, columns, strict=True):
        rows = {variant: group for (length, variant), group in groups.items() if length == steps}
        title = f"{'validation loss' if metric == 'loss' else metric}, {steps} steps"
        plots.dots(axis, list(rows), [[r[metric] for r in group] for group in rows.values()], title=title, x="lower is better")
    plots.save(made, out / "options.png")
