"""One self-contained page about a run: what it draws, beside what is real, how it got there, and what it is worth."""

import base64
import html
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from dip_jax.config import Config, to_dict
from dip_jax.reporting import figures
from dip_jax.runtime import goodput, storage, writers
from dip_jax.sampling.trajectories import Frames

_CLASSES, _EACH, _WAYS = 12, 8, 4  # classes shown, images of each, trajectories
_CURVES = (
    ("loss", "Training loss"),
    ("images_per_second", "Speed, images per second"),
    ("grad_norm", "Gradient norm"),
)
_TITLES = {"initial": "untrained (step 0)", "raw": "last weights", "ema": "averaged weights (EMA)"}
_PACKAGES = ("dip_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "Pillow")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #6a6f76; --paper: #fff; --panel: #f5f6f8; --line: #e2e5e9;
  --accent: #2f6fe4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --faint: #9aa1aa; --paper: #14161a; --panel: #1d2025;
  --line: #30353c; --accent: #7aa7ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 48px 28px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 52px 0 4px; }
p { max-width: 72ch; margin: 6px 0 14px; }
.faint, figcaption, th { color: var(--faint); }
.class { display: grid; grid-template-columns: 172px 1fr 1fr; gap: 8px 26px; padding: 12px 0; align-items: center;
  border-top: 1px solid var(--line); }
.class > div { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; }
.head { border: 0; padding: 4px 0; color: var(--faint); font-size: 14px; }
.head > * { display: block !important; }
.name { font-weight: 600; overflow-wrap: break-word; hyphens: manual; }
img { display: block; width: 100%; height: auto; border-radius: 3px; }
.way { display: grid; gap: 4px; align-items: center; margin: 10px 0 18px; font-size: 13px; color: var(--faint); }
.way span { text-align: center; } .way .row { text-align: right; padding-right: 8px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 18px; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: 14px; } figure svg { width: 100%; height: auto; }
.numbers { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 22px 0 2px; } .numbers b { display: block; font-size: 24px;
  font-variant-numeric: tabular-nums; } .numbers span { color: var(--faint); font-size: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 10px 0; }
th, td { padding: 7px 18px 7px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; font-size: 14px; } th:first-child, td:first-child { text-align: left; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 10px 0; font-size: 14px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
ul { padding-left: 20px; max-width: 76ch; }
@media (max-width: 720px) { .class { grid-template-columns: 1fr 1fr; } .name { grid-column: 1 / -1; }
  .curves { grid-template-columns: 1fr; } }
"""


def titles(run: Config, average: str, decay: float | None) -> dict[str, str]:
    """What the table calls each kind of weights; a run that began with a model's weights was not untrained at step 0."""
    begun = {"initial": "as it began (step 0)"} if run.train.init_from else {}
    return {**_TITLES, **begun} | ({} if decay is None else {average: f"averaged weights (EMA {decay})"})


def write_report(
    path: epath.PathLike,
    *,
    title: str,
    samples: figures.Labelled,
    real: figures.Labelled,
    class_names: Sequence[str],
    trajectory: Frames | None,
    history: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    config: Config,
    notes: Sequence[str] = (),
) -> epath.Path:
    """Writes report.html: one file, no script, nothing loaded from elsewhere, readable in light and dark.

    Args:
        path: the file.
        title: the heading.
        samples: what the model draws; up to 8 of each of the first 12 classes are shown.
        real: training images to show beside them.
        class_names: names of all classes.
        trajectory: the way from noise to image of a few samples, from `trajectories.draw_frames`; None leaves it out.
        history: rows of metrics.jsonl; "step" with "loss", "images_per_second", "grad_norm" and `goodput.shares` where known.
        metrics: rows of the table, all with the same keys in the same order; the first names the row, N is one of them.
        config: of the run.
        notes: sentences under the table: how the metrics were taken, and what they do not show.

    Returns:
        The file.
    """
    sections = [
        _headline(metrics),
        _classes(samples, real, class_names),
        "" if trajectory is None else _trajectory(trajectory, class_names),
        _curves(history),
        _spent(history),
        _metrics(metrics, notes),
        _config(config),
        _versions(),
    ]
    path = storage.absolute(path)
    storage.write_text(path, _page(title, _subtitle(config, history), "\n".join(sections)))
    return path


def _page(title: str, subtitle: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_text(title)}</h1>\n"
        f'<p class="faint">{_text(subtitle)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _subtitle(config: Config, history: Sequence[Mapping[str, Any]]) -> str:
    model = config.model
    step = max((row["step"] for row in history if "step" in row), default=0)
    height, width = model.image_size
    return (
        f"DiP/{model.patch_size}, {model.depth} layers of width {model.width}, {model.head} head ({model.placement}), "
        f"{height}\u00d7{width} pixels, {model.num_classes} classes, {step} steps of batch {config.data.batch_size}"
    )


def _headline(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of the last row, which is the run's result."""
    if not metrics:
        return ""
    name, *values = metrics[-1].items()
    tiles = "".join(f"<div><b>{_text(_measured(value))}</b><span>{_text(key)}</span></div>" for key, value in values)
    return f'<div class="numbers">{tiles}</div>\n<p class="faint">{_text(str(name[1]))}; all rows are below.</p>'


def _classes(samples: figures.Labelled, real: figures.Labelled, names: Sequence[str]) -> str:
    rows = []
    for label in sorted(set(samples.labels.tolist()))[:_CLASSES]:
        name = names[label] if label < len(names) else "no class"
        drawn = "".join(_image(x, f"sample {i + 1} of {name}") for i, x in enumerate(samples.of(label, _EACH)))
        shown = "".join(_image(x, f"real image {i + 1} of {name}") for i, x in enumerate(real.of(label, _EACH)))
        rows.append(
            f'<div class="class"><span class="name">{_breakable(name)}</span><div>{drawn}</div><div>{shown}</div></div>'
        )
    head = '<div class="class head"><span></span><div>Drawn by the model</div><div>Real training images</div></div>'
    return _section(
        "Samples", "One row per class: the first samples drawn, not chosen, beside real images.", head + "\n".join(rows)
    )


def _trajectory(way: Frames, names: Sequence[str]) -> str:
    columns = len(way.times) + 1
    style = f'style="grid-template-columns: 120px repeat({columns}, 1fr)"'
    heads = "".join(f"<span>t = {t:.2f}</span>" for t in way.times.tolist()) + "<span>sample</span>"
    blocks = [f'<div class="way" {style}><span></span>{heads}']
    for b, label in enumerate(way.labels.tolist()[:_WAYS]):
        name = names[label] if label < len(names) else "no class"
        end = _image(way.images[b], f"sample of {name}")
        for kind, frames in (("noisy image", way.noisy[:, b]), ("expected image", way.expected[:, b])):
            cells = "".join(_image(x, f"{kind} at t={t:.2f}") for x, t in zip(frames, way.times.tolist(), strict=True))
            blocks.append(f'<span class="row"><b>{_breakable(name)}</b><br>{kind}</span>{cells}{end}')
    text = "Time runs from noise (t = 0) to data (t = 1). Below each noisy image is the image the network expects at the end."
    return _section("From noise to image", text, "".join(blocks) + "</div>")


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    drawn = [figures.curve(history, key, title=title) for key, title in _CURVES]
    pictures = "".join(f"<figure>{svg}</figure>" for svg in drawn if svg)
    if not pictures:
        return ""
    return _section("Training", "Faint: as logged; strong: running mean.", f'<div class="curves">{pictures}</div>')


def _spent(history: Sequence[Mapping[str, Any]]) -> str:
    """Where the hours went, by the last row that says so."""
    last = next((row for row in reversed(history) if row.get("wall_seconds")), None)
    if last is None:
        return ""
    names = {goodput.COLUMNS[part]: words for part, words in goodput.PARTS.items()}
    body = "".join(f"<tr><td>{_text(words)}</td><td>{last.get(name) or 0:.1%}</td></tr>" for name, words in names.items())
    text = f"Of {writers.duration(last['wall_seconds'])} since the first start, at step {last['step']}."
    return _section("Where the time went", text, f'<div class="scroll"><table><tbody>{body}</tbody></table></div>')


def _metrics(metrics: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    if not metrics:
        return ""
    keys = list(metrics[0])
    head = "".join(f"<th>{_text(key)}</th>" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{_text(_measured(row.get(key)))}</td>" for key in keys) + "</tr>" for row in metrics)
    listed = "".join(f"<li>{_text(note)}</li>" for note in notes)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return _section("Metrics", "", table + (f"<ul>{listed}</ul>" if listed else ""))


def _config(config: Config) -> str:
    parts = [f"<details><summary>{_text(name)}</summary>{_list(values)}</details>" for name, values in to_dict(config).items()]
    return _section("Config", "", "".join(parts))


def _versions() -> str:
    device = jax.devices()[0]
    values = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    values["devices"] = f"{jax.device_count()} \u00d7 {device.device_kind} ({device.platform}), {jax.process_count()} host(s)"
    return _section("Versions", "", _list(values))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p class=faint>{_text(text)}</p>' if text else ''}\n{body}</section>"


def _list(values: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{_text(key)}</dt><dd>{_text(_value(value))}</dd>" for key, value in values.items())
    return f"<dl>{items}</dl>"


def _measured(value: Any) -> str:
    """A cell of the metric table: as many decimals as make four digits, so that columns line up."""
    if not isinstance(value, float):
        return _value(value)
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, tuple | list):
        return ", ".join(_value(item) for item in value) or "none"
    return "\u2013" if value is None else str(value)


def _text(text: str) -> str:
    return html.escape(text)


def _breakable(name: str) -> str:
    """A class name that may be broken where it has an underscore."""
    return _text(name).replace("_", "_<wbr>")


def _image(image: Any, alt: str) -> str:
    kind, data = figures.encode(image)
    height, width = image.shape[:2]
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{_text(alt)}" width="{width}" height="{height}">'
