"""Any image-classification dataset of TFDS, and the one of our own that is built as such."""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dip_jax.data.sources.split import Item
from dip_jax.errors import UserError


@dataclass(frozen=True)
class TfdsSplit:
    """A split of a TFDS dataset that was built as ArrayRecord; images come out as the bytes that were put in."""

    folder: str
    split: str
    image: str  # key of the image feature
    label: str  # key of the label feature
    classes: list[str]
    content: str  # what TFDS says of the split: its version, records and bytes
    records: range
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Item:
        example = _tfds_reader(self.folder, self.split, self.image)[self.records[i]]
        return Item(f"{self.split}[{self.records[i]}]", example[self.image], int(example[self.label]))

    def part(self, start: int, stop: int) -> "TfdsSplit":
        """The items in [start, stop)."""
        return dataclasses.replace(self, records=self.records[start:stop])

    def listing(self) -> Iterator[tuple[str, str]]:
        """One line: a built dataset does not change."""
        yield self.split, self.content


@functools.cache  # one per process
def _tfds_reader(folder: str, split: str, image: str):
    import tensorflow_datasets as tfds  # here and below: it takes seconds, and folders do without

    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})


def open_tfds(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, TfdsSplit]:
    """Any image-classification dataset of TFDS, built as ArrayRecord in the data_dir `root` unless it is there already.

    Raises:
        UserError: if there is no such dataset, it has no image with a class label, its files must be fetched by hand first,
            or TFDS builds it with TensorFlow.
    """
    import tensorflow_datasets as tfds

    del image_size, scratch
    if not argument:
        raise UserError("--source=tfds needs a name: --source=tfds:imagenet2012, --source=tfds:cifar10, ...")
    try:
        builder = tfds.builder(argument, data_dir=root or None, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        if found := re.search(r"File format is already set to FileFormat\.(\w+)", str(error)):
            kind = found.group(1).lower()
            raise UserError(
                f"--from={root} holds {argument} as {kind} files, not array_record: give another data_dir as --from"
            ) from None
        raise UserError(f"--source=tfds:{argument}: {str(error).strip().splitlines()[0]}") from None
    try:
        return _tfds_splits(builder)
    except ImportError:
        raise UserError(
            f"TFDS builds {argument} with packages that are not installed here (TensorFlow, as a rule): build it once where "
            f"they are, by tfds.builder({argument!r}, data_dir=DIR, file_format='array_record').download_and_prepare(), "
            "and give that DIR as --from; reading it needs nothing more"
        ) from None
    except AssertionError as error:  # TFDS's way to ask for files that must be fetched by hand
        raise UserError(f"--source=tfds:{argument}: {' '.join(str(error).split())}") from None


def _tfds_splits(builder) -> dict[str, TfdsSplit]:
    """Builds the dataset unless that was done before, and describes its splits."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if keys := builder.info.supervised_keys:
        images, labels = [k for k in images if k == keys[0]], [k for k in labels if k == keys[1]]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(f"{builder.name} has the features {', '.join(features)}: one image and one class label are needed")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself at length; its progress bars go to stderr
        builder.download_and_prepare(file_format="array_record")
    return {
        name: TfdsSplit(
            folder=os.fspath(builder.data_path),
            split=name,
            image=images[0],
            label=labels[0],
            classes=list(features[labels[0]].names),
            content=f"{builder.info.full_name} {name} {info.num_examples} {info.num_bytes}",
            records=range(info.num_examples),
        )
        for name, info in builder.info.splits.items()
        if info.num_examples
    }


def open_photo_crops(argument: str, root: str, image_size: int | None, scratch: pathlib.Path) -> dict[str, TfdsSplit]:
    """Random crops of ten photographs (`photo_crops.PhotoCrops`), built in the scratch folder."""
    import tensorflow_datasets as tfds

    from dip_jax.data import photo_crops

    del argument, root
    config = photo_crops.CropsConfig(image_size)
    tfds.disable_progress_bar()  # the generator has its own
    return _tfds_splits(photo_crops.PhotoCrops(config=config, data_dir=os.fspath(scratch), file_format="array_record"))
