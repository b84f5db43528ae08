"""The paper's own experiments at small scale, each as CSV files and a picture.

    python -m benchmarks.paper figure3       one photograph overfitted: DiT-only against DiP
    python -m benchmarks.paper table2        Table 2 and Figure 5: five heads, three placements, equal steps and equal time
    python -m benchmarks.paper figure10      depth and width of the U-Net, patch size
    python -m benchmarks.paper figure4       Figures 4 and 8: t-SNE of features (uses table2's runs)
    python -m benchmarks.paper options       the options of docs/objective.md and their pairs against plain
    python -m benchmarks.paper repa          alignment on and off; --teacher=FILE takes your DINOv2 instead of a random one

Run it again after an interruption, or when the budget is over: finished runs are kept in --work, and the one under way goes on.
--plot-only draws the PNG from the CSV. --scale=gpu is the same at a size for one GPU.
"""

import argparse
import pathlib
import sys

from benchmarks.paper import figure3, figure4, figure10, options, repa, table2
from benchmarks.paper.scale import SCALES
from benchmarks.paper.session import Session
from dip_jax.errors import Exit, Interrupted, UserError

EXPERIMENTS = {
    "figure3": figure3,
    "table2": table2,
    "figure10": figure10,
    "figure4": figure4,
    "options": options,
    "repa": repa,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one experiment and draws its picture; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=EXPERIMENTS)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--budget", type=float, default=20.0, help="minutes after which training saves and stops")
    parser.add_argument("--out", type=pathlib.Path, help="folder of CSV and PNG; docs/figures, with --scale=gpu below it")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/paper"), help="folder of datasets and runs")
    parser.add_argument("--teacher", type=pathlib.Path, help="repa: a published file, such as dinov2_vitb14_pretrain.pth")
    parser.add_argument("--plot-only", action="store_true", help="draw the PNG from the CSV that is there")
    arguments = parser.parse_args(argv)
    out = arguments.out or pathlib.Path("docs/figures") / ("" if arguments.scale == "cpu" else arguments.scale)
    experiment = EXPERIMENTS[arguments.figure]
    try:
        if not arguments.plot_only:
            work = arguments.work.absolute() / arguments.scale
            session = Session(SCALES[arguments.scale], out=out, work=work, minutes=arguments.budget, teacher=arguments.teacher)
            experiment.compute(session)
        experiment.plot(out)
    except UserError as error:
        print(f"benchmarks.paper: {error}", file=sys.stderr)
        return Exit.USER_ERROR
    except Interrupted as stop:
        print(f"benchmarks.paper: {stop}", file=sys.stderr)
        return stop.code
    print(f"wrote {out / arguments.figure}.png")
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
