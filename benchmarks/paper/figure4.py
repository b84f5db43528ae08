"""Figures 4 and 8: t-SNE of pooled features of DiT-only and of the three placements, with a score of the clusters."""

import functools
import pathlib

import numpy as np

from benchmarks.paper import measure, plots, tables
from benchmarks.paper.scale import photo_crops_config
from benchmarks.paper.session import Session
from benchmarks.paper.table2 import VARIANTS, run_name
from dip_jax.data import prepared

POINTS, SCORES = "figure4.csv", "figure4_scores.csv"
SHOWN = ("DiT-only", "U-Net, post-hoc", "U-Net, intermediate", "U-Net, hybrid")


def compute(session: Session) -> None:
    """Features of the runs of Table 2 (trained where they are missing): scores of every seed, the picture of the first."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    from sklearn.preprocessing import StandardScaler

    data = session.photo_crops()
    session.expect(len(SHOWN) * len(session.scale.seeds))
    images, labels = measure.read_images(data / "validation", 10 * session.scale.points_per_class)
    names = prepared.open_dataset(data / "validation").classes

    def quality(workdir: pathlib.Path) -> dict:
        return measure.quality(workdir, session.scale, data)

    points, scores = [], []
    settings = functools.partial(photo_crops_config, session.scale, data=str(data / "train"))
    for seed in session.scale.seeds:
        for name in SHOWN:
            run = run_name(VARIANTS[name], seed=seed)
            session.run(run, settings(seed=seed, **VARIANTS[name]), quality)
            features = StandardScaler().fit_transform(measure.pooled_features(session.work / run, images))
            scores.append({"variant": name, "seed": seed, "silhouette": float(silhouette_score(features, labels))})
            if seed == session.scale.seeds[0]:
                placed = TSNE(random_state=0, init="pca", perplexity=min(30, len(images) // 4)).fit_transform(features)
                points += [
                    {"variant": name, "class": names[label], "x": float(x), "y": float(y)}
                    for label, (x, y) in zip(labels.tolist(), placed, strict=True)
                ]
    tables.write(session.out / POINTS, points)
    tables.write(session.out / SCORES, scores)


def plot(out: pathlib.Path) -> None:
    """A panel per variant, a marker and a colour per class; the score in the title."""
    variants = plots.by(tables.read(out / POINTS), "variant")
    scores = plots.by(tables.read(out / SCORES), "variant")
    made = plots.figure(11, 9)
    axes = made.subplots(2, 2).ravel()
    for axis, ((name,), points) in zip(axes, variants.items(), strict=True):
        for (color, marker, _), ((label,), group) in zip(plots.STYLES, sorted(plots.by(points, "class").items()), strict=True):
            xy = np.array([(point["x"], point["y"]) for point in group])
            axis.scatter(*xy.T, color=color, marker=marker, s=22, alpha=0.8, linewidths=0, label=label)
        values = [row["silhouette"] for row in scores[(name,)]]
        plots.tidy(axis, title=f"{name}: silhouette {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        axis.set_xticks([])
        axis.set_yticks([])
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    plots.save(made, out / "figure4.png")
