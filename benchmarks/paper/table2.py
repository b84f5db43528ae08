"""Table 2 and Figure 5: five heads and three placements at equal steps, on the same data, with the same seeds."""

import functools
import pathlib

from benchmarks.paper import measure, plots, tables
from benchmarks.paper.scale import photo_crops_config
from benchmarks.paper.session import Session

QUALITY, TIMES = "table2.csv", "table2_times.csv"
VARIANTS = {
    "DiT-only": {"head": "none"},
    "standard MLP": {"head": "mlp"},
    "intra-patch attention": {"head": "attention"},
    "coordinate MLP": {"head": "coord_mlp"},
    "U-Net, post-hoc": {"head": "unet"},
    "U-Net, intermediate": {"head": "unet", "placement": "intermediate"},
    "U-Net, hybrid": {"head": "unet", "placement": "hybrid"},
}


def run_name(fields: dict, *, seed: int) -> str:
    """The workdir of a run on the ten photographs: experiments that ask for the same run share it."""
    words = [f"{key}={value}" for key, value in sorted(fields.items())]
    return "_".join(["crops", *words, f"seed={seed}"])


def compute(session: Session) -> None:
    """Trains all variants with all seeds, seed by seed; writes the rows of every finished run."""
    data = session.photo_crops()
    session.expect(len(VARIANTS) * len(session.scale.seeds))

    def quality(workdir: pathlib.Path) -> dict:
        return measure.quality(workdir, session.scale, data)

    rows = []
    settings = functools.partial(photo_crops_config, session.scale, data=str(data / "train"))
    timed = {name: settings(seed=0, **fields) for name, fields in VARIANTS.items()}
    seconds = session.once(session.work / "table2_step_seconds.json", lambda: measure.step_seconds(timed))
    tables.write(session.out / TIMES, [{"variant": name, "step_seconds": value} for name, value in seconds.items()])
    for seed in session.scale.seeds:
        for name, fields in VARIANTS.items():
            found = session.run(run_name(fields, seed=seed), settings(seed=seed, **fields), quality)
            rows.append({"variant": name, "seed": seed, "steps": session.scale.steps} | found)
            tables.write(session.out / QUALITY, rows)


def plot(out: pathlib.Path) -> None:
    """Loss, fid_lite0, step time and parameters, a row per variant."""
    groups = plots.by(tables.read(out / QUALITY), "variant")
    seconds = {row["variant"]: row["step_seconds"] for row in tables.read(out / TIMES)}
    names = [name for (name,) in groups]
    count = {row["N"] for rows in groups.values() for row in rows}
    made = plots.figure(12, 4.6)
    axes = made.subplots(1, 4, sharey=True)
    plots.dots(
        axes[0], names, [[r["loss"] for r in rows] for rows in groups.values()], title="validation loss", x="lower is better"
    )
    plots.dots(
        axes[1],
        names,
        [[r["fid_lite0"] for r in rows] for rows in groups.values()],
        title=f"fid_lite0, N = {min(count)}",
        x="lower is better",
    )
    base = seconds[names[0]]
    plots.dots(axes[2], names, [[seconds[name] / base] for name in names], title="step time", x="over DiT-only's")
    million = [[r["parameters"] / 1e6 for r in rows][:1] for rows in groups.values()]
    plots.dots(axes[3], names, million, title="parameters", x="million")
    plots.save(made, out / "table2.png")
