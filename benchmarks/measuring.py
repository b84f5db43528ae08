"""What the benchmarks share: interleaved timing, FLOPs by formula and by XLA, variants by name, and the record of a run.

A busy machine disturbs all variants alike only if they take turns (A B A B, every second round backwards) and if the clock
counts what they themselves use: on a CPU the process's CPU seconds; on an accelerator, which nobody shares, wall seconds.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from dip_jax import config  # noqa: E402
from dip_jax.errors import UserError  # noqa: E402
from dip_jax.models import cost, dip  # noqa: E402
from dip_jax.runtime import accelerators, sharding  # noqa: E402
from dip_jax.sampling import sampler  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled function, what compiling took (seconds, first and again from the cache) and what XLA says of it."""

    call: Any
    cold: float
    warm: float
    xla_flops: float  # of the program as written, before XLA changes it; a scanned block counts once
    temp_bytes: int


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def one_device() -> contextlib.AbstractContextManager:
    """What is traced inside is this platform's program, as under a command of dip_jax: without a mesh it would suit any."""
    return jax.set_mesh(sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1]))


def build(function: Callable, *operands: Any) -> Built:
    """`build_jitted` of a function that is not jitted yet."""
    return build_jitted(jax.jit(function), *operands)


def build_jitted(function: Any, *operands: Any) -> Built:
    """Compiles twice through a cache of its own, on disk."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update(names[0], folder)
        jax.config.update(names[1], 0.0)
        taken = []
        for _ in range(2):
            _forget_cache()
            start = time.perf_counter()
            lowered = function.lower(*operands)
            compiled = lowered.compile()
            taken.append(time.perf_counter() - start)
            jax.clear_caches()
        for name, value in before.items():
            jax.config.update(name, value)
        _forget_cache()
    flops = (lowered.cost_analysis() or {}).get("flops", float("nan"))
    return Built(compiled, *taken, flops, compiled.memory_analysis().temp_size_in_bytes)


def _forget_cache() -> None:
    compilation_cache.reset_cache()


def interleave(calls: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, dict[str, float]]:
    """Runs all in turn, `rounds` times after one that warms up: medians and quartiles of seconds, CPU and wall.

    "speed" is how many times as fast as the first of them, round by round: median and quartiles.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(calls[name]())
            if turn:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    first = next(iter(taken.values()))
    return {name: _summary(pairs, first) for name, pairs in taken.items()}


def _summary(pairs: Sequence[tuple[float, float]], first: Sequence[tuple[float, float]]) -> dict[str, float]:
    clock = 0 if on_cpu() else 1
    speeds = [other[clock] / pair[clock] for pair, other in zip(pairs, first, strict=True)]
    cpu, wall = zip(*pairs, strict=True)
    seconds, speed = _quartiles(cpu if on_cpu() else wall), _quartiles(speeds)
    return {
        **dict(zip(("seconds", "low", "high"), seconds, strict=True)),
        **dict(zip(("speed", "speed_low", "speed_high"), speed, strict=True)),
        "cpu_seconds": statistics.median(cpu),
        "wall_seconds": statistics.median(wall),
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    ordered, quarter = sorted(values), len(values) // 4
    return statistics.median(ordered), ordered[quarter], ordered[-1 - quarter]


def within(minutes: float, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of `table` until `minutes` are over; those left out are named, so that one call never runs into its limit."""
    end = time.monotonic() + 60 * minutes
    for number, (name, value) in enumerate(table.items()):
        if time.monotonic() > end:
            print(f"left out after {minutes} minutes: {', '.join(list(table)[number:])}", file=sys.stderr, flush=True)
            return
        yield name, value


def variants(text: str) -> dict[str, dict[str, str]]:
    """`name:key=value,key=value;name:...` -> {name: {key: value}}; a name without a colon changes nothing.

    Raises:
        UserError: for a setting without "=".
    """
    table = {}
    for part in text.split(";"):
        name, _, settings = part.partition(":")
        pairs = [setting.partition("=") for setting in settings.split(",") if setting]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            raise UserError(f"variant {name!r} has {wrong[0]!r} where key=value is expected, such as scan_layers=False")
        table[name.strip()] = {key: value for key, _, value in pairs}
    return table


def with_settings(section: Any, settings: Mapping[str, str]) -> Any:
    """A config section with those of `settings` that are its fields, read as its own types."""
    names = {field.name for field in dataclasses.fields(section)}
    changes = {}
    for key in names & set(settings):
        text, old = settings[key], getattr(section, key)
        if isinstance(old, tuple):
            changes[key] = tuple(type(old[0])(part) for part in text.split("/"))
        elif isinstance(old, bool):
            changes[key] = {"True": True, "False": False}[text]
        else:
            changes[key] = type(old)(text) if old is not None else int(text)
    return dataclasses.replace(section, **changes)


def make_model(size: str, image_size: int, settings: Mapping[str, str], **fields: Any) -> dip.DiP:
    """The model of one variant: 16-pixel patches (32 at 512 px) and the compute dtype of this backend, then `settings`."""
    dtype = "float32" if on_cpu() else "bfloat16"
    fields = {"patch_size": 32 if image_size == 512 else 16} | fields
    base = config.Model(size=size, image_size=(image_size, image_size), dtype=dtype, **fields)
    return dip.from_config(with_settings(base, settings))


def make_drawing_weights(model: dip.DiP) -> Any:
    """Weights that draw something: those of `model.init` say zero where the last layer starts there."""

    def make(key):
        return jax.tree.map(lambda p: p + 0.02 * jax.random.normal(key, p.shape), model.init(key))

    return jax.block_until_ready(jax.jit(make)(jax.random.key(0)))


def trajectory(model: dip.DiP, sample: config.Sample, *, ahead: bool) -> Callable:
    """(params, labels) -> the samples, to be jitted; modulations made before the first step (`ahead`) or in every one."""

    def draw(params, labels):
        return sampler.draw(
            functools.partial(model.apply, params),
            key=jax.random.key(0),
            indices=labels,
            labels=labels,
            image_shape=(*model.config.image_size, 3),
            sample=sample,
            null_label=model.config.num_classes,
            ahead=functools.partial(model.modulations, params) if ahead else None,
        )

    return draw


def forward_flops(model: dip.DiP) -> int:
    """FLOPs of one image's forward pass, by formula."""
    return sum(cost.forward_flops(model.config).values())


def utilisation(flops_per_second: float) -> float | None:
    """The share of the accelerator's bf16 peak; None where the peak is not known."""
    peak = accelerators.peak_flops(jax.devices()[0].device_kind)
    return flops_per_second / peak if peak else None


def peak_bytes() -> int:
    """The most memory held so far: of the device, on a CPU of the process."""
    stats = None if on_cpu() else jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def asked(options: argparse.Namespace, *, without: Sequence[str] = ()) -> dict[str, str]:
    """The options of a run as `save` records them: all but where it writes, and `without`."""
    return {key: str(value) for key, value in vars(options).items() if key not in ("out", *without)}


def save(
    what: str, config: Mapping[str, Any], rows: Any, *, out: pathlib.Path | None = None, clock: str | None = None
) -> pathlib.Path:
    """Writes the run to `benchmarks/results/WHAT_DEVICE.json` (or `out`), with all that is needed to repeat it."""
    device = jax.devices()[0]
    kind = "cpu" if on_cpu() else device.device_kind.replace(" ", "_").lower()
    run = {
        "what": what,
        "command": _command(),
        "revision": _git("rev-parse", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--", "dip_jax", "benchmarks/*.py") else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "hardware": {"device": device.device_kind, "devices": jax.device_count(), "cpu": _cpu_name(), "cores": os.cpu_count()},
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, **_plugin_versions()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "clock": clock or ("process CPU seconds" if on_cpu() else "wall seconds"),
        "config": dict(config),
        "rows": rows,
    }
    path = out or RESULTS / f"{what}_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)
    return path


def _command() -> str:
    """The command line, without what only this machine knows."""
    kept = [part if part.partition("=")[0] != "--pixnerd" else "--pixnerd=PIXNERD_CHECKOUT" for part in sys.argv[1:]]
    return shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *(part for part in kept if not part.startswith("--out="))])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plugin_versions() -> dict[str, str]:
    names = ("jaxlib", "flax", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "libtpu", "torch")
    return {name: metadata.version(name) for name in names if any(True for _ in metadata.distributions(name=name))}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
