"""What the tests of `prepare` share: a folder of images, the command, and what it made."""

import hashlib
import os
import pathlib
import sys

import numpy as np
from pictures import encoded, photograph
from PIL import Image

# `prepare` with SHARD images per shard, whose writers count the images they begin and stop for ever at number LAST.
COUNTED_JOB = """
import os, sys, time
from dip_jax.__main__ import main
from dip_jax.data import writing

store, journal, last = writing._store, os.environ["JOURNAL"], int(os.environ["LAST"])

def counted(*args, **kwargs):
    with open(journal, "ab") as file:
        file.write(b".")
    while os.path.getsize(journal) > last:
        time.sleep(0.01)
    return store(*args, **kwargs)

writing._store = counted
writing.RECORDS_PER_SHARD = int(os.environ["SHARD"])
writing._GRACE = 10.0
os.environ["JAX_HEARTBEAT_SECONDS"] = "10"
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def make_folder(root: pathlib.Path, *, classes=("ants", "bees", "cats"), per_class=4, size=(60, 45)) -> pathlib.Path:
    """An ImageFolder of small photographs, all different."""
    rng = np.random.default_rng(0)
    base = photograph(*size)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            image = Image.fromarray(np.roll(np.asarray(base), rng.integers(1000), axis=1) ^ np.uint8(rng.integers(256)))
            (root / name / f"{i:03d}.png").write_bytes(encoded(image, "PNG", compress_level=1))
    return root


def content(folder: pathlib.Path) -> dict[str, str]:
    """A digest of every file below a folder."""
    return {
        os.fspath(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(root: pathlib.Path, out: pathlib.Path, *flags: str, source: str = "folder") -> list[str]:
    """`prepare` of such a folder, or of another source, as a process of its own."""
    return [
        sys.executable,
        "-m",
        "dip_jax",
        "prepare",
        f"--source={source}",
        f"--from={root}",
        f"--out={out}",
        "--image_size=48",
        *flags,
    ]
