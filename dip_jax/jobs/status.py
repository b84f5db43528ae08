"""What a run is doing and where its hours went, from its workdir alone, on a disk or in a bucket. Touches no device.

It reads only, so a run that is going on is not disturbed. Times are of the wall since the first start.

Examples:
  python -m dip_jax status --workdir=runs/demo
  python -m dip_jax status --workdir=runs/demo --verify   reads every checkpoint and compares its hashes
  python -m dip_jax status --workdir=runs/demo --json
"""

import json
import time
from typing import Any

from absl import flags as absl_flags
from etils import epath

from dip_jax.checkpoints import directories, manifest
from dip_jax.errors import UserError
from dip_jax.reporting import console
from dip_jax.runtime import goodput, storage, writers

_LAST = ("loss", "images_per_second", "seconds_per_step", "mfu", "data_wait", "skipped", "replaced")  # of the last row


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Adds the command's flags."""
    absl_flags.DEFINE_string("workdir", None, "of the run", flag_values=flags)
    absl_flags.DEFINE_boolean("verify", False, "read every checkpoint and compare its hashes", flag_values=flags)
    absl_flags.DEFINE_boolean("json", False, "print one JSON object instead of tables", flag_values=flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    if not flags.workdir:
        raise UserError("--workdir is missing: name that of a run, such as --workdir=runs/demo")
    facts = describe(storage.absolute(flags.workdir), verify=flags.verify)
    print(json.dumps(facts, indent=2) if flags.json else "\n".join(_tell(facts)))


def describe(workdir: epath.Path, *, verify: bool = False, now: float | None = None) -> dict[str, Any]:
    """What is known of a run, as JSON values.

    Args:
        workdir: of the run.
        verify: compare the hashes of every checkpoint.
        now: seconds since 1970.

    Raises:
        UserError: if there is no run.
    """
    config = workdir / "config.json"
    if not config.exists():
        raise UserError(f"{workdir} is no workdir of a run, it has no config.json: name the --workdir that train was given")
    now, local = time.time() if now is None else now, storage.is_local(workdir)
    starts = goodput.read_starts(workdir)
    rows = writers.read_rows(workdir / "metrics.jsonl")
    last = rows[-1] if rows else {}
    steps, done = json.loads(config.read_text())["train"]["steps"], last.get("step", 0)
    root = workdir / directories.ROOT
    saved = directories.complete(root)
    done = max([done, *saved, *(start.step for start in starts[-1:])])
    return {
        "workdir": str(workdir),
        "state": "finished" if steps in saved else _state(starts, now, local=local),
        "step": done,
        "steps": steps,
        "last_sign": starts[-1].last if starts else None,
        "last": {key: last[key] for key in _LAST if last.get(key) is not None},
        "seconds": goodput.divide(starts),
        "starts": goodput.read_rows(starts, now, local=local),
        "checkpoints": [row for step in saved if (row := _describe_step(root / str(step), verify=verify))],
        "damaged": sorted(path.name for path in (root / "damaged").iterdir()) if (root / "damaged").is_dir() else [],
    }


def _state(starts: list[goodput.Start], now: float, *, local: bool) -> str:
    if not starts:
        return "unknown, it left no goodput.json"
    code = starts[-1].exit
    if starts[-1].runs(now, local=local):
        return "going on"
    return "killed, or its host is gone" if code is None else f"ended with exit code {code}"


def _describe_step(path: epath.Path, *, verify: bool) -> dict[str, Any] | None:
    """A row about a checkpoint; None where it went while it was looked at, as in a run that is going on."""
    try:
        size = sum((path / name).stat().length for name in manifest.files_below(path))
        verified = "no manifest" if manifest.find_manifest(path) is None else "manifest there"
        if verify:
            fault = manifest.damage(path)
            verified = f"damaged: {fault}" if fault else "as it was written"
        return {"checkpoint": path.name, "bytes": size, "hashes": verified} if path.exists() else None
    except FileNotFoundError:
        return None


def _tell(facts: dict[str, Any]) -> list[str]:
    seconds = facts["seconds"]
    total = sum(seconds.values())
    spent = [
        {"time since the first start": words, "share": f"{seconds[name] / total:.1%}", "hours": writers.duration(seconds[name])}
        for name, words in goodput.PARTS.items()
        if total
    ]
    sum_row = [{"time since the first start": "in all", "share": "100.0%", "hours": writers.duration(total)}] if total else []
    sign = facts["last_sign"] and time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts["last_sign"]))
    about = {
        "workdir": facts["workdir"],
        "state": facts["state"],
        "step": f"{facts['step']:,} of {facts['steps']:,}",
        "last sign of life": sign,
        **facts["last"],
        "damaged": ", ".join(f"{directories.ROOT}/damaged/{name}" for name in facts["damaged"]),
    }
    saved = [{**row, "bytes": console.size(row["bytes"])} for row in facts["checkpoints"]]
    tables = [console.table(rows) for rows in (spent + sum_row, facts["starts"], saved) if rows]
    return console.aligned(about) + [line for table in tables for line in ("", *table)]
