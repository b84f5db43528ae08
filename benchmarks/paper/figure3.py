"""Figure 3: one photograph overfitted by DiT-only and by DiP, with the velocity and with the image as prediction."""

import pathlib
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image

from benchmarks.paper import measure, plots, tables
from benchmarks.paper.scale import photograph_config
from benchmarks.paper.session import Session
from dip_jax.checkpoints import checkpoint
from dip_jax.checkpoints import directories as step_files
from dip_jax.sampling import trajectories

CURVES, PICTURES = "figure3.csv", "figure3_images.png"
MODELS = {"DiT-only": "none", "DiP (U-Net)": "unet"}
PREDICTIONS = {"x": "predicts the image", "v": "predicts the velocity"}
CROP = (0.26, 0.19, 0.27)  # top, left and side of what is shown enlarged, as shares of the side: an eye and its fur


def compute(session: Session) -> None:
    """Trains two models with each prediction; writes a row per point of each curve, and the images that they end with."""
    data = session.photograph()
    variants = [(name, prediction) for prediction in PREDICTIONS for name in MODELS]
    settings = {
        (name, prediction): photograph_config(session.scale, data=str(data), head=MODELS[name], prediction=prediction)
        for name, prediction in variants
    }
    session.expect(len(variants))
    original = measure.read_images(data, 1)[0][0]

    def points(workdir: pathlib.Path) -> list[dict[str, float]]:
        return [{"step": step} | measure.likeness(image, original) for step, image in drawn(workdir)]

    timed = {name: settings[name, next(iter(PREDICTIONS))] for name in MODELS}
    seconds = session.once(session.work / "figure3_step_seconds.json", lambda: measure.step_seconds(timed))
    rows, images = [], [original]
    for name, prediction in variants:
        run = f"figure3_{MODELS[name]}_{prediction}"
        for point in session.run(run, settings[name, prediction], points):
            row = {"model": name, "prediction": prediction, "step": point["step"], "seconds": point["step"] * seconds[name]}
            rows.append(row | {key: point[key] for key in ("psnr", "high_frequency_error")})
        images.append(next(drawn(session.work / run, newest=True))[1])
        tables.write(session.out / CURVES, rows)
        Image.fromarray(np.concatenate(images, axis=1)).save(session.out / PICTURES, optimize=True)


def drawn(workdir: pathlib.Path, *, newest: bool = False) -> Iterator[tuple[int, np.ndarray]]:
    """(step, image) of the averaged weights of every checkpoint, always from the same noise; or of the newest alone."""
    root = epath.Path(workdir) / step_files.ROOT
    for step in step_files.complete(root)[-1 if newest else 0 :]:
        model, params = checkpoint.load(root / str(step), verify=False)
        options = checkpoint.read_record(root / str(step)).config.sample
        batches = trajectories.draw_batches(model, params, labels=[0], seed=0, options=options)
        yield step, next(batches)[1][0]


def plot(out: pathlib.Path) -> None:
    """Curves from the CSV; the images and their crops from the strip beside it."""
    curves = plots.by(tables.read(out / CURVES), "model", "prediction")
    with Image.open(out / PICTURES) as file:
        strip = np.asarray(file.convert("RGB"))
    predictions = list(dict.fromkeys(prediction for _, prediction in curves))
    made = plots.figure(11, 5.5 + 2.9 * len(predictions))
    above, below = made.subfigures(2, 1, height_ratios=[2.9 * len(predictions), 5.5])
    for axes, prediction in zip(above.subplots(len(predictions), 3, squeeze=False), predictions, strict=True):
        _show_curves(axes, curves, prediction)
    _show_pictures(below, strip, curves)
    plots.save(made, out / "figure3.png")


def _show_curves(axes, curves: dict, prediction: str) -> None:
    """PSNR over steps, PSNR over time, and what is missing of the detail, for one prediction."""
    panels = (
        ("step", "step", "psnr", "PSNR over steps"),
        ("seconds", "seconds of training", "psnr", "PSNR over time"),
        ("step", "step", "high_frequency_error", "error at periods below 16 pixels"),
    )
    for axis, (x, label, key, title) in zip(axes, panels, strict=True):
        for (color, marker, dash), name in zip(plots.STYLES, MODELS, strict=False):
            rows = curves.get((name, prediction), [])
            axis.plot([r[x] for r in rows], [r[key] for r in rows], color=color, marker=marker, linestyle=dash, label=name)
        unit = "dB" if key == "psnr" else "share of the photograph's"
        plots.tidy(axis, title=f"{title}\n{PREDICTIONS[prediction]}", x=label, y=unit)
        axis.legend(frameon=False)


def _show_pictures(part, strip: np.ndarray, curves: dict) -> None:
    """The photograph and what each model draws at the end, whole and zoomed."""
    images = np.split(strip, strip.shape[1] // strip.shape[0], axis=1)
    names = ["photograph", *(f"{name}\n{PREDICTIONS[prediction]}" for name, prediction in curves)]
    ends = ["", *(f"{rows[-1]['psnr']:.1f} dB" for rows in curves.values())]
    axes = part.subplots(2, len(images))
    for column, (image, name, end) in enumerate(zip(images, names, ends, strict=True)):
        axes[0, column].imshow(image)
        axes[0, column].set_title(name, fontsize=9)
        top, left, side = (round(part * len(image)) for part in CROP)
        axes[1, column].imshow(image[top : top + side, left : left + side], interpolation="nearest")
        axes[1, column].set_xlabel(end)
        for row in range(2):
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
