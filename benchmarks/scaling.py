"""How the cost grows: forward, and forward + backward, against image size, batch, depth and devices, with fits.

    python benchmarks/scaling.py                       DiP-tiny on two CPU cores
    python benchmarks/scaling.py --gpu --rounds=10     DiP-B/16 in bfloat16: one call on a GPU

Along each axis all points run in turn. The exponent is the slope of log(seconds) over log(x) between the largest two points; a
fixed cost makes it smaller than the arithmetic's, so a term that nobody can explain shows as a larger one. "line" is the least
squares seconds = a + b x, and the largest deviation from it. Devices share one batch; on a CPU they are threads of the same
cores, so that CPU seconds should stay level.
"""

import argparse
import os
import pathlib
import sys

if __name__ == "__main__" and "--gpu" not in sys.argv:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from jax.sharding import NamedSharding

from dip_jax import config
from dip_jax.runtime import sharding

CPU = {"image_size": (64, 128, 256), "batch": (2, 8, 32), "depth": (2, 4, 8), "devices": (1, 2, 4)}
GPU = {"image_size": (256, 512, 1024), "batch": (16, 64, 256), "depth": (6, 12, 24), "devices": (1, 2, 4, 8)}


def compile_point(axis: str, value: int, options: argparse.Namespace) -> dict[str, tuple]:
    """Kind -> (compiled, operands); and the FLOPs of the forward pass under "flops"."""
    at = {"image_size": options.image_size, "batch": options.batch, "depth": options.depth, "devices": 1, axis: value}
    size = at["image_size"]
    fields = {"depth": at["depth"], "patch_size": 16, "num_classes": 10, "head_width": options.head_width}
    model = measuring.make_model(options.size, size, {}, **fields)
    mesh = sharding.make_mesh(config.Mesh(data=at["devices"]), jax.devices()[: at["devices"]])
    split, whole = (NamedSharding(mesh, sharding.spec(axes)) for axes in (("batch",), ()))
    params = jax.jit(model.init, out_shardings=whole)(jax.random.key(0))
    x = jax.device_put(jax.random.normal(jax.random.key(1), (at["batch"], size, size, 3)), split)
    t, y = (jax.device_put(jnp.zeros(at["batch"], dtype), split) for dtype in (jnp.float32, jnp.int32))

    def loss(params, x, t, y):
        return jnp.mean(jnp.square(model.apply(params, x, t, y) - x))

    with jax.set_mesh(mesh):
        forward, both = (jax.jit(f).lower(params, x, t, y).compile() for f in (model.apply, jax.value_and_grad(loss)))
    operands = (params, x, t, y)
    return {"forward": (forward, operands), "both": (both, operands), "flops": at["batch"] * measuring.forward_flops(model)}


def fit(points: list[dict]) -> dict:
    """How seconds and FLOPs grow along one axis."""
    x, seconds, flops = (np.array([point[key] for point in points], float) for key in ("x", "seconds", "flops"))
    slope = np.log(x[-1] / x[-2])
    line = np.polynomial.Polynomial.fit(x, seconds, 1)
    return {
        "exponent": float(np.log(seconds[-1] / seconds[-2]) / slope),
        "exponent_flops": float(np.log(flops[-1] / flops[-2]) / slope),
        "line": line.convert().coef.tolist(),
        "deviation": float(np.max(np.abs(line(x) - seconds) / seconds)),
    }


def measure(options: argparse.Namespace) -> list[dict]:
    rows = []
    for axis in options.axes:
        values = [value for value in (GPU if options.gpu else CPU)[axis] if axis != "devices" or value <= jax.device_count()]
        points = {value: compile_point(axis, value, options) for value in values}
        calls = {
            (value, kind): lambda case=point[kind]: case[0](*case[1])
            for value, point in points.items()
            for kind in ("forward", "both")
        }
        times = measuring.interleave(calls, rounds=options.rounds)
        for kind, passes in (("forward", 1), ("both", 3)):
            table = [
                # A square of side `image_size` has (side / 16)^2 tokens: the axis is the tokens.
                {"x": (value // 16) ** 2 if axis == "image_size" else value, "flops": passes * point["flops"]}
                | times[value, kind]
                for value, point in points.items()
            ]
            growth = fit(table) if len(table) > 1 else None
            rows.append({"axis": "tokens" if axis == "image_size" else axis, "kind": kind, "points": table, "fit": growth})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="larger sizes")
    parser.add_argument("--size", help="row of config.SIZES")
    for name in ("image_size", "batch", "depth", "head_width"):
        parser.add_argument(f"--{name}", type=int, help="where it is not the axis")
    parser.add_argument("--axes", type=lambda text: text.split(","), default=list(CPU))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    presets = {"size": "B", "image_size": 256, "batch": 64, "depth": 12, "head_width": 64}
    presets = presets if options.gpu else {"size": "tiny", "image_size": 64, "batch": 8, "depth": 4, "head_width": 8}
    for name, value in presets.items():
        setattr(options, name, getattr(options, name) or value)
    rows = measure(options)
    header = ("axis", "kind", "x", "seconds", "exponent", "of FLOPs", "deviation from line")
    lines = [
        [row["axis"], row["kind"], "/".join(str(point["x"]) for point in row["points"])]
        + ["/".join(f"{point['seconds']:.3f}" for point in row["points"])]
        + ([row["fit"]["exponent"], row["fit"]["exponent_flops"], row["fit"]["deviation"]] if row["fit"] else ["", "", ""])
        for row in rows
    ]
    print(measuring.table(header, lines))
    measuring.save("scaling", measuring.asked(options), rows, out=options.out)


if __name__ == "__main__":
    main()
