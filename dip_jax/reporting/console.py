"""Results and settings as short aligned lines for a terminal; what is left out here stands in the JSON beside them."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table with a head, names at the left and numbers at the right; columns are the keys of all rows."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [[key, *(_cell(row.get(key)) for row in rows)] for key in keys]
    widths = [max(map(len, column)) for column in columns]
    left = [isinstance(rows[0].get(key), str) for key in keys]
    cells = zip(*columns, strict=True)
    return ["  ".join(_padded(*cell) for cell in zip(line, widths, left, strict=True)).rstrip() for line in cells]


def aligned(values: Mapping[str, Any]) -> list[str]:
    """A line each, the names in a column; nothing for a value that is empty or None."""
    shown = {key: _cell(value) for key, value in values.items() if _cell(value)}
    width = max(map(len, shown), default=0)
    return [f"{key.ljust(width)}  {value}" for key, value in shown.items()]


def sampling(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a reader asks first about a set of samples, in words: weights, solver, guidance, seed. Unknown keys are passed over.

    Args:
        settings: as `sample` writes them beside its samples; any of them may be missing.
    """
    model = settings.get("model")
    dtype = settings.get("dtype") or (model.get("dtype") if isinstance(model, Mapping) else None)
    nfe, interval = settings.get("nfe"), settings.get("interval")
    lines = {
        "weights": [settings.get("weights"), _with(settings, "step", "step {}"), dtype],
        "solver": [
            settings.get("solver"),
            _with(settings, "steps", "{} steps"),
            " + ".join(map(str, nfe.values())) + " network evaluations each" if isinstance(nfe, Mapping) else None,
            _with(settings, "t_shift", "time shift {:g}") if settings.get("t_shift") != 1 else None,
        ],
        "guidance": [
            _with(settings, "guidance", "{:g}"),
            "where {:g} < t < {:g}".format(*interval) if _is_interval(interval) else None,
            _with(settings, "internal_guidance", "internal {:g}") if settings.get("internal_guidance") != 1 else None,
        ],
        "seed": [settings.get("seed")],
    }
    return {key: ", ".join(str(part) for part in parts if part is not None) for key, parts in lines.items()}


def behind(protocol: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the numbers were taken (a judge's protocol) and, where it is known, how the samples of each row were drawn.

    What all rows share stands there once.
    """
    counts = f"{protocol['reference_images']} images" if protocol["reference_images"] else ""
    lines = {
        "features": f"{protocol['features']}, images {protocol['input']}" if protocol["input"] else protocol["features"],
        "reference": ", ".join(filter(None, [protocol["reference"], counts, f"statistics {protocol['reference_statistics']}"])),
        "neighbours": protocol["precision_recall"],
        "nearest": protocol["nearest"],
        "border": protocol["border"],
    }
    drawn = {name: sampling(values) for name, values in settings.items() if values}
    if drawn and len(drawn) == len(settings) and all(words == next(iter(drawn.values())) for words in drawn.values()):
        return aligned(lines | next(iter(drawn.values())))
    return aligned(lines | {name: "; ".join(filter(None, words.values())) for name, words in drawn.items()})


def size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _with(settings: Mapping[str, Any], key: str, form: str) -> str | None:
    value = settings.get(key)
    try:
        return None if value is None else form.format(value)
    except (ValueError, TypeError):  # another program's settings
        return str(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(end, int | float) for end in value)


def _padded(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)
