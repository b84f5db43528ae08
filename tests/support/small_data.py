"""Datasets of a few pixels for the tests, written without `prepare`."""

import pathlib
from collections.abc import Callable

import numpy as np

from dip_jax.data import prepared, shards


def pixels_of(i: int, size: int) -> np.ndarray:
    """The image of record i: its number in the first bytes, a left-right gradient after."""
    image = np.broadcast_to(np.arange(size, dtype=np.uint8)[None, :, None], (size, size, 3)).copy()
    image[0, 0] = (i % 256, i // 256 % 256, i // 65536)
    return image


def number_of(image: np.ndarray) -> int:
    """Inverse of `pixels_of`."""
    red, green, blue = (int(v) for v in image[0, 0])
    return red + 256 * green + 65536 * blue


def write_dataset(
    folder: pathlib.Path,
    count: int,
    *,
    size: int = 4,
    classes: int = 5,
    per_shard: int = 7,
    record: Callable[[int], tuple[int, bytes]] | None = None,
) -> prepared.Dataset:
    """`count` records, label i mod classes; `record` may make others."""
    folder.mkdir(parents=True, exist_ok=True)
    record = record or (lambda i: (i % classes, pixels_of(i, size).tobytes()))
    parts = [range(start, min(start + per_shard, count)) for start in range(0, count, per_shard)]
    written = [
        shards.write_shard(folder / f"train-{k:05d}-of-{len(parts):05d}.array_record", map(record, part))
        for k, part in enumerate(parts)
    ]
    info = shards.DatasetInfo(
        source="test",
        classes=tuple(f"class_{k}" for k in range(classes)),
        class_counts=tuple(len(range(k, count, classes)) for k in range(classes)),
        image_size=size,
        encoding="raw",
        shards=tuple(written),
    )
    (folder / shards.DATASET_FILE).write_text(info.to_json())
    return prepared.open_dataset(folder)
