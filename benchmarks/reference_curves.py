"""Trains configs/reference.py with three seeds and writes the losses of docs/reference_curves.md.

    python benchmarks/reference_curves.py [--curves=64,256] [--seeds=0,1,2] [--data=datasets] [--work=runs/reference]

Prepares the two datasets where they are missing. Run it again after an interruption: a run goes on where it stopped, and what
is finished is read. A row per curve and seed: the loss of each of the first 20 steps, and means over the last tenth of the
first 100, 300, 1,000 and 10,000 steps.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys

from etils import epath

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.paper import tables  # noqa: E402
from dip_jax.runtime import writers  # noqa: E402

TABLE = ROOT / "docs" / "figures" / "reference_curves.csv"
FIRST = 20
MARKS = (100, 300, 1000, 10_000)
PREPARED = {"64": ("photo_crops", []), "256": ("photo_crops_256", ["--image_size=256", "--encoding=tiff"])}


def dip(*arguments: str) -> None:
    """One command of dip_jax; ends this one where it fails."""
    code = subprocess.run([sys.executable, "-m", "dip_jax", *arguments], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def run(curve: str, *, seed: int, data: pathlib.Path, workdir: pathlib.Path) -> dict[int, float]:
    """Trains one curve with one seed, or goes on, or reads it: the loss by step."""
    folder, flags = PREPARED[curve]
    dip("prepare", "--source=photo_crops", *flags, f"--out={data / folder}")
    config = [f"--config=configs/reference.py:{curve}", f"--config.data.path={data / folder}", f"--config.train.seed={seed}"]
    dip("train", *config, f"--workdir={workdir}")
    return losses(workdir)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The loss of every step that has a row."""
    return {row["step"]: row["loss"] for row in writers.read_rows(epath.Path(workdir / "metrics.jsonl")) if "loss" in row}


def summary(found: dict[int, float]) -> dict[str, float | str]:
    """`step_N`: the loss of step N; `mean_N`: its mean over the last tenth of N steps, empty where there are fewer."""
    values: dict[str, float | str] = {f"step_{n}": found[n] for n in range(1, FIRST + 1)}
    for n in MARKS:
        values[f"mean_{n}"] = statistics.fmean(found[k] for k in range(n - n // 10 + 1, n + 1)) if n in found else ""
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", default="64,256")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "datasets")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "reference")
    parser.add_argument("--out", type=pathlib.Path, default=TABLE)
    arguments = parser.parse_args()
    rows = []
    for curve in arguments.curves.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            found = run(curve, seed=seed, data=arguments.data.absolute(), workdir=arguments.work.absolute() / f"{curve}_{seed}")
            rows.append({"curve": curve, "seed": seed} | summary(found))
            tables.write(arguments.out, rows)
            print(
                *(f"{key} {value:.4f}" for key, value in rows[-1].items() if key.startswith("mean") and value != ""), flush=True
            )


if __name__ == "__main__":
    main()
