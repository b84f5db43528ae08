"""Figure 10: depth and width of the U-Net head; patch size with the head and without it."""

import functools
import pathlib

from benchmarks.paper import measure, plots, tables
from benchmarks.paper.scale import Scale, photo_crops_config
from benchmarks.paper.session import Session
from benchmarks.paper.table2 import run_name

QUALITY = "figure10.csv"
DEPTHS = (1, 2, 3, 4)
PANELS = {"depth": "(a) stages of the U-Net", "width": "(a) base channels of the U-Net", "patch": "(b) patch size"}


def variants(scale: Scale) -> list[tuple[str, str, int, dict]]:
    """(panel, line, abscissa, model fields) of every point; the same run may be a point of several panels."""
    default = scale.head_sizes.get("unet", {}).get("head_width", 64)
    points = [("depth", "DiP", depth, {"head": "unet"} | ({"head_depth": depth} if depth < 4 else {})) for depth in DEPTHS]
    points += [
        ("width", "DiP", width, {"head": "unet"} | ({"head_width": width} if width != default else {}))
        for width in scale.widths
    ]
    for line, head in (("DiT-only", "none"), ("DiP", "unet")):
        points += [
            ("patch", line, patch, {"head": head} | ({"patch_size": patch} if patch != 16 else {})) for patch in scale.patches
        ]
    return points


def compute(session: Session) -> None:
    """Trains every point with every seed; writes the rows of every finished run."""
    data = session.photo_crops()
    points = variants(session.scale)
    session.expect(len(points) * len(session.scale.seeds))

    def quality(workdir: pathlib.Path) -> dict:
        return measure.quality(workdir, session.scale, data)

    rows = []
    settings = functools.partial(photo_crops_config, session.scale, data=str(data / "train"))
    for seed in session.scale.seeds:
        for panel, line, value, fields in points:
            found = session.run(run_name(fields, seed=seed), settings(seed=seed, **fields), quality)
            row = {"panel": panel, "line": line, "value": value, "seed": seed, "steps": session.scale.steps}
            rows.append(row | found)
            tables.write(session.out / QUALITY, rows)


def plot(out: pathlib.Path) -> None:
    """A column per panel: loss above, fid_lite0 below; a dot per seed, a line through the means."""
    rows = tables.read(out / QUALITY)
    made = plots.figure(11, 6.2)
    axes = made.subplots(2, len(PANELS), sharey="row")
    for column, (panel, title) in enumerate(PANELS.items()):
        lines = plots.by([row for row in rows if row["panel"] == panel], "line")
        for style, ((line,), points) in zip(plots.STYLES, sorted(lines.items(), reverse=True), strict=False):
            for axis, key in zip(axes[:, column], ("loss", "fid_lite0"), strict=True):
                _line(axis, points, key, style=style, label=line)
        for axis, key in zip(axes[:, column], ("validation loss", f"fid_lite0, N = {rows[0]['N']}"), strict=True):
            plots.tidy(axis, title=title, x=panel, y=key if column == 0 else "")
            values = sorted({point["value"] for points in lines.values() for point in points})
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
            axis.legend(frameon=False)
    plots.save(made, out / "figure10.png")


def _line(axis, points: list[dict], key: str, *, style: tuple, label: str) -> None:
    color, marker, dash = style
    groups = plots.by(points, "value")
    values = sorted(groups)
    means = [sum(point[key] for point in groups[value]) / len(groups[value]) for value in values]
    axis.plot([value for (value,) in values], means, color=color, linestyle=dash, label=label)
    axis.plot([p["value"] for p in points], [p[key] for p in points], marker, color=color, alpha=0.6, markersize=5)
