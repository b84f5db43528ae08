"""DiP-XL on machines that are not there, by their own compilers: the tables of docs/scaling.md.

    python -m benchmarks.topologies                                         all rows, memory alone: half an hour on one core
    python -m benchmarks.topologies --machines=v5p-64 --jobs=train          some of them
    python -m benchmarks.topologies --machines=v6e-8 --sizes=512 --whole    with machine code: the compiler's full time, cycles

Needs the extras aot-tpu and aot-gpu; starts no device. `memory alone` ends libtpu's compiles before machine code.
"""

import argparse
import dataclasses
import json
import pathlib
import runpy

from dip_jax import config
from dip_jax.jobs import info
from dip_jax.planning import machine, topologies

MACHINES = ("v5e-16", "v5p-64", "v6e-8", "h100x8", "v5p-256", "h100x64")
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "dip.py"
HEADER = ("machine", "program", "mesh", "state", "temporaries", "left", "smallest change", "estimate", "traced, compiled (s)")
_GIB = 2**30


def describe(name: str, size: str, job: str, *, alignment: bool, whole: bool) -> dict:
    """One row: what `info --topology` knows, and its estimate from shapes."""
    options = runpy.run_path(str(CONFIG))["get_config"](size)
    options.repa.weight = 0.5 if alignment else 0.0
    topology = topologies.parse(name)
    chosen = config.from_config_dict(options)
    chosen = dataclasses.replace(chosen, mesh=info.fill(chosen.mesh, devices=topology.devices))
    facts = machine.describe(chosen, topology=topology, job=job, machine_code=whole)
    estimate = info.describe(chosen, mesh=chosen.mesh)["bytes_per_device"] if job == "train" else None
    return {"machine": name, "size": size, "repa": alignment, **facts, "name": name, "estimate": estimate}


def line(row: dict) -> str:
    """A row of the table, sizes in GiB per device."""
    memory = row["bytes_per_device"]
    job = {"train": "training", "sample": "sampling"}[row["job"]]
    program = f"{job}, {row['size']}x{row['size']}" + (", no REPA" if row["job"] == "train" and not row["repa"] else "")
    mesh = ",".join(f"{axis}:{size}" for axis, size in row["mesh"].items() if size > 1) or "data:1"
    if row["fits"]:
        sizes = [f"{memory[name] / _GIB:.2f}" for name in ("state", "temporaries", "left")]
        change, seconds = "", f"{row['trace_seconds']:.0f}, {row['compile_seconds']:.0f}"
    else:
        found = row["change"]
        sizes, seconds = [f"{memory['needed'] / _GIB:.2f} in all", "", "does not fit"], ""
        change = f"`{found['flags']}`: {found['needed'] / _GIB:.2f}" if found else "none is known"
    estimate = f"{row['estimate']['total'] / _GIB:.2f}" if row["estimate"] else ""
    return f"| {' | '.join([row['name'], program, f'`{mesh}`', *sizes, change, estimate, seconds])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("machines", MACHINES), ("sizes", ("256", "512")), ("jobs", ("train", "sample"))):
        parser.add_argument(f"--{name}", type=lambda text: tuple(text.split(",")), default=values)
    parser.add_argument("--no_repa", action="store_true", help="training without the alignment's teacher")
    parser.add_argument("--whole", action="store_true", help="compile to machine code")
    parser.add_argument("--out", type=pathlib.Path, help="JSON of all rows")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    rows = []
    for job in options.jobs:
        for size in options.sizes:
            for name in options.machines:
                rows.append(describe(name, size, job, alignment=not options.no_repa, whole=options.whole))
                print(line(rows[-1]), flush=True)
                if options.out:
                    options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
