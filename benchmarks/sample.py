"""Sampling: latency at batch 1, throughput at larger batches, seconds per network evaluation, and what each choice is worth.

    python benchmarks/sample.py                                   DiP-tiny at 64 px on two CPU cores, 8 steps
    python benchmarks/sample.py --variants="b1:batch=1;heun:batch=1,solver=heun"
    python benchmarks/sample.py --gpu --rounds=5                  DiP-XL/16 at 256 px, 100 steps: one call on a GPU

A variant is name:key=value,... of fields of `config.Model` and `config.Sample`, and batch. A time is `draw_batches`'
from labels to uint8 images on the host, divided by the batches drawn (3 at a time: the conversion of the weights is shared, the
host's copy runs beside the next batch). One evaluation is one image through the network once; outside the guidance interval
there is one per step, inside there are two. `benchmarks/sample_levers.py` measures what is done ahead of the first step.
"""

import argparse
import pathlib
import sys
import time

import jax
import measuring
import numpy as np

from dip_jax import config
from dip_jax.sampling import sampler, trajectories

CPU = (
    "b1:batch=1;b1_scan:batch=1,scan_layers=True;b1_half:batch=1,interval=0.5/1.0;b1_unguided:batch=1,guidance=1.0;"
    "b8:batch=8;b32:batch=32"
)
GPU = (
    "b1_scan:batch=1;b64:batch=64;b1:batch=1,scan_layers=False;b64_no_head:batch=64,head=none;"
    "b1_xla:batch=1,scan_layers=False,attention=xla;b1_everywhere:batch=1,scan_layers=False,interval=0.0/1.0;"
    "b8:batch=8;b256:batch=256;b64_xla:batch=64,attention=xla;b1_float32:batch=1,dtype=float32"
)
BATCHES = 3


def measure(options: argparse.Namespace) -> list[dict]:
    calls, rows, params = {}, {}, {}
    for name, settings in measuring.within(options.minutes, measuring.variants(options.variants)):
        fields = {} if options.gpu else {"scan_layers": False, "num_classes": 10}
        model = measuring.make_model(options.size, options.image_size, settings, **fields)
        batch = int(settings.get("batch", 1))
        sample = measuring.with_settings(config.Sample(steps=options.steps, batch_size=batch), settings)
        head = model.config.head
        if head not in params:
            params[head] = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0)))
        labels = np.arange(BATCHES * batch, dtype=np.int32) % model.config.num_classes

        def call(model=model, sample=sample, labels=labels, params=params[head]):
            return [images for _, images in trajectories.draw_batches(model, params, labels=labels, seed=0, options=sample)]

        start = time.perf_counter()
        call()
        conditional, unconditional = sampler.nfe(sample)
        rows[name] = {"variant": name, "settings": settings, "batch": batch, "first_call_seconds": time.perf_counter() - start}
        rows[name] |= {"nfe": [conditional, unconditional]}
        rows[name] |= {"flops": batch * (conditional + unconditional) * measuring.forward_flops(model)}
        rows[name] |= {"peak_bytes": measuring.peak_bytes()}
        calls[name] = call
        print(f"first call of {name} took {rows[name]['first_call_seconds']:.1f} s", file=sys.stderr, flush=True)
    for name, timing in measuring.interleave(calls, rounds=options.rounds).items():
        row = rows[name]
        row |= {key: value if key.startswith("speed") else value / BATCHES for key, value in timing.items()}
        rate = row["flops"] / row["seconds"]
        row |= {
            "images_per_second": row["batch"] / row["seconds"],
            "flops_per_second": rate,
            "mfu": measuring.utilisation(rate),
        }
        row |= {"seconds_per_evaluation": row["seconds"] / row["batch"] / sum(row["nfe"])}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="sizes and variants of the paper's model")
    parser.add_argument("--size", help="row of config.SIZES")
    parser.add_argument("--variants")
    for name in ("image_size", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="no further variant is compiled after so long")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    presets = {"size": "XL", "variants": GPU, "image_size": 256, "steps": 100}
    presets = presets if options.gpu else {"size": "tiny", "variants": CPU, "image_size": 64, "steps": 8}
    for name, value in presets.items():
        setattr(options, name, getattr(options, name) or value)
    rows = measure(options)
    header = (
        "variant",
        "batch",
        "NFE",
        "seconds",
        "low",
        "high",
        "images/s",
        "ms/evaluation",
        "GFLOP/s",
        "MFU",
        "first call s",
    )
    lines = [
        [row["variant"], row["batch"], "{}+{}".format(*row["nfe"]), row["seconds"], row["low"], row["high"]]
        + [row["images_per_second"], 1e3 * row["seconds_per_evaluation"], row["flops_per_second"] / 1e9, row["mfu"]]
        + [row["first_call_seconds"]]
        for row in rows
    ]
    print(measuring.table(header, lines))
    measuring.save("sample", measuring.asked(options), rows, out=options.out)


if __name__ == "__main__":
    main()
