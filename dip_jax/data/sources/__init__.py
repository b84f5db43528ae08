"""Where `prepare` reads from: one row of `SOURCES` per kind of source, one file per family.

A source opens as splits by name; a split gives encoded images by position, and is cheap to send to another process. Nothing is
unpacked to disk: archives are read where they are.
"""

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dip_jax.data.sources.files import open_csv, open_folder
from dip_jax.data.sources.parquet import open_parquet
from dip_jax.data.sources.split import Item as Item
from dip_jax.data.sources.split import Split
from dip_jax.data.sources.tars import open_imagenet_tar, open_webdataset
from dip_jax.data.sources.tfds import open_photo_crops, open_tfds
from dip_jax.data.sources.zips import open_zip


@dataclass(frozen=True)
class Source:
    """A row of `SOURCES`.

    Attributes:
        open: (what follows "NAME:" in --source, --from, image size or None, scratch folder) -> splits by name.
        encoding: what a dataset made from it stores unless --encoding says otherwise.
        image_size: the crop size unless --image_size says otherwise.
    """

    open: Callable[[str, str, int | None, pathlib.Path], Mapping[str, Split]]
    encoding: str = "tiff"
    image_size: int | None = None


SOURCES = {
    "folder": Source(open_folder),
    "csv": Source(open_csv),
    "zip": Source(open_zip),
    "parquet": Source(open_parquet),
    "webdataset": Source(open_webdataset),
    "imagenet_tar": Source(open_imagenet_tar),
    "tfds": Source(open_tfds),
    "photo_crops": Source(open_photo_crops, encoding="raw", image_size=64),
}
