"""Table 2 and Figure 5: five heads and three placements, same data and seeds, at equal steps and at equal time."""

import dataclasses
import pathlib

from benchmarks.paper import measure, plots, seeds, tables
from benchmarks.paper.scale import photo_crops_config
from benchmarks.paper.session import Session
from dip_jax.config import Config

QUALITY, TIMES, VERDICTS = "table2.csv", "table2_times.csv", "table2_verdicts.csv"
METRICS = {"loss": "validation loss", "fid_lite0": "fid_lite0"}
POST_HOC = "U-Net, post-hoc"
VARIANTS = {
    "DiT-only": {"head": "none"},
    "standard MLP": {"head": "mlp"},
    "intra-patch attention": {"head": "attention"},
    "coordinate MLP": {"head": "coord_mlp"},
    POST_HOC: {"head": "unet"},
    "U-Net, intermediate": {"head": "unet", "placement": "intermediate"},
    "U-Net, hybrid": {"head": "unet", "placement": "hybrid"},
}


def run_name(fields: dict, *, seed: int, steps: int | None = None) -> str:
    """The workdir of a run on the ten photographs: experiments that ask for the same run share it."""
    words = [f"{key}={value}" for key, value in sorted(fields.items())]
    return "_".join(["crops", *words, *([f"steps={steps}"] if steps else []), f"seed={seed}"])


def equal_time(seconds: dict[str, float], *, steps: int) -> dict[str, int]:
    """How many steps each variant takes in the time in which the post-hoc U-Net takes `steps`."""
    return {name: max(1, round(steps * seconds[POST_HOC] / each)) for name, each in seconds.items()}


def compute(session: Session) -> None:
    """Trains all variants with all seeds, first for equal steps, then for equal time; writes the rows of every finished run."""
    data, scale = session.photo_crops(), session.scale
    session.expect(2 * len(VARIANTS) * len(scale.seeds))

    def settings(name: str, *, seed: int, steps: int) -> Config:
        return photo_crops_config(
            dataclasses.replace(scale, steps=steps), seed=seed, data=str(data / "train"), **VARIANTS[name]
        )

    def quality(workdir: pathlib.Path) -> dict:
        return measure.quality(workdir, scale, data)

    timed = {name: settings(name, seed=0, steps=scale.steps) for name in VARIANTS}
    seconds = session.once(session.work / "table2_step_seconds.json", lambda: measure.step_seconds(timed))
    tables.write(session.out / TIMES, [{"variant": name, "step_seconds": value} for name, value in seconds.items()])
    lengths = {"steps": dict.fromkeys(VARIANTS, scale.steps), "time": equal_time(seconds, steps=scale.steps)}
    rows = []
    for equal, steps_of in lengths.items():
        for seed in scale.seeds:
            for name, steps in steps_of.items():
                run = run_name(VARIANTS[name], seed=seed, steps=None if steps == scale.steps else steps)
                found = session.run(run, settings(name, seed=seed, steps=steps), quality)
                rows.append({"equal": equal, "variant": name, "seed": seed, "steps": steps} | found)
                tables.write(session.out / QUALITY, rows)
                tables.write(session.out / VERDICTS, verdicts(rows))


def verdicts(rows: list[dict]) -> list[dict]:
    """By length and metric: the variants in order, each with whether three seeds tell it from the next one."""
    found = []
    for (equal,), group in plots.by(rows, "equal").items():
        for metric in METRICS:
            values: dict[str, dict[int, float]] = {}
            for row in group:
                values.setdefault(row["variant"], {})[row["seed"]] = row[metric]
            found += [{"equal": equal, "metric": metric} | row for row in seeds.neighbours(values)]
    return found


def plot(out: pathlib.Path) -> None:
    """Loss and fid_lite0 at equal steps and at equal time, step time and parameters, a row per variant."""
    groups = plots.by(tables.read(out / QUALITY), "equal", "variant")
    seconds = {row["variant"]: row["step_seconds"] for row in tables.read(out / TIMES)}
    names = list(seconds)
    made = plots.figure(16, 4.6)
    axes = iter(made.subplots(1, 2 * len(METRICS) + 2, sharey=True))
    for metric, title in METRICS.items():
        for equal in ("steps", "time"):
            rows = [groups.get((equal, name), []) for name in names]
            values = [[row[metric] for row in each] for each in rows]
            plots.dots(next(axes), names, values, title=f"{title}\nequal {equal}", x="lower is better")
    base = seconds[names[0]]
    plots.dots(next(axes), names, [[seconds[name] / base] for name in names], title="step time", x="over DiT-only's")
    million = [[row["parameters"] / 1e6 for row in groups["steps", name]][:1] for name in names]
    plots.dots(next(axes), names, million, title="parameters", x="million")
    plots.save(made, out / "table2.png")
