"""A dataset at a glance: a row of images per class."""

import pathlib

import numpy as np

from dip_jax.data import prepared, shards
from dip_jax.reporting import figures

_LOOKED_AT = 4096  # records spread evenly over the dataset, whose labels decide what is shown
_CLASSES, _PER_CLASS = 10, 8
_SIDE = 128  # of what a dataset of originals shows, pixels


def write(path: pathlib.Path) -> None:
    """Writes the picture of the dataset in the picture's folder; the same dataset gives the same picture."""
    originals = shards.read_info(path.parent).image_size is None
    dataset = prepared.Dataset(path.parent, image_size=_SIDE if originals else None)
    records = np.linspace(0, len(dataset) - 1, min(len(dataset), _LOOKED_AT)).round().astype(int).tolist()
    labels = np.array([dataset.label(i) for i in records])
    present = np.unique(labels)
    rows = present[np.linspace(0, len(present) - 1, min(len(present), _CLASSES)).round().astype(int)]
    chosen = [records[k] for label in rows for k in np.flatnonzero(labels == label)[:_PER_CLASS]]
    shown = [dataset[i] for i in chosen]
    pictures = figures.Labelled(np.stack([one["image"] for one in shown]), np.array([one["label"] for one in shown]))
    figures.class_grid(pictures, dataset.classes).save(path)
