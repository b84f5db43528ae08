"""A release: one folder with a model's averaged weights, to be loaded, committed to git or uploaded as it is.

    FOLDER/
      ema/, config/     items as in a step of a workdir (`checkpoints/checkpoint.py`); no optimizer
      MANIFEST.sha256   their hashes
      README.md         model card, to be completed by whoever releases it; not hashed

Nothing in it tells where it was made: absolute paths and buckets of the config become names, and Orbax's markers lose theirs.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from dip_jax import __version__
from dip_jax.checkpoints import averages, items, manifest, orbax_logging
from dip_jax.config import Config
from dip_jax.errors import UserError
from dip_jax.runtime import storage
from dip_jax.typing import Params

_FILE_BYTES = 2**25  # GitHub warns from 50 MB on
_DATASETS = "datasets"  # where README's commands look for what lay elsewhere

_CARD = """---
library_name: dip_jax
pipeline_tag: unconditional-image-generation
tags: [diffusion, flow-matching, pixel-space, jax, flax]
license: other
---

# {title}

A pixel-space diffusion model trained with dip_jax, after [*DiP: Taming Diffusion Models in Pixel
Space*](https://github.com/NJU-PCALab/DiP). TODO: what it draws, in one sentence.

## Use

```python
import dip_jax

model, params = dip_jax.load("{address}")
images = dip_jax.sample(  # uint8 [{count}, {height}, {width}, 3]
    model, params, labels={labels}, seed=0, {options}
)
```

```bash
python -m dip_jax sample --checkpoint={address} --out=samples.png
```

## Model

| | |
|---|---|
{model}

## Training

| | |
|---|---|
{training}

## Classes

{classes}

## Numbers

TODO: metric, number of samples, reference and command (`python -m dip_jax evaluate ...`) of each.

## Limits, data and licence

TODO: what it must not be used for, where the images come from, under which licence images and weights may be used.
"""


def write_release(
    out: epath.PathLike,
    params: Params,
    record: items.Record,
    *,
    step: int,
    weights: str = "ema",
    dtype: str = "float32",
    address: str = "",
) -> epath.Path:
    """Writes a release folder, whole or not at all; returns it.

    Args:
        out: the folder to make.
        params: float32 weights.
        record: of the step that they come from.
        step: how many updates they have seen.
        weights: which of them they are ("ema", "raw", or the item of another average), for the card.
        dtype: what they are stored in, "float32" or "bfloat16" (half the bytes, each weight rounded to 8 bits); `load` gives
            float32 either way.
        address: what the card's commands name, where that is another than the folder's name.

    Raises:
        UserError: if the folder exists already or cannot be written, or the disk is full.
    """
    orbax_logging.quieten_orbax()
    out = storage.absolute(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    storage.require_writable(out.parent)
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    storage.require_space(out.parent, int(1.1 * size))
    began_elsewhere = bool(record.config.train.init_from)  # then no seed makes its first weights
    shown = without_places(record.config)
    if weights in averages.NAMES:  # of several averages one is handed out, as the item `ema`
        decays = record.config.optim.ema_decays[averages.NAMES.index(weights) :][:1]
        shown = dataclasses.replace(shown, optim=dataclasses.replace(shown.optim, ema_decays=decays))
    public = dataclasses.replace(record, config=shown, stored=dtype, data={} if began_elsewhere else record.data)

    def before_commit() -> None:
        there = manifest.unfinished(out)
        card = describe(public, name=out.name, address=address or out.name, step=step, weights=weights, params=params)
        storage.write_text(there / "README.md", card)
        manifest.write_manifest(out, name=manifest.SHA256)  # known to every machine, and no forgery passes it

    with items.open_writer(before_commit) as writer:
        writer.save(out, args=items.compose({"ema": params}, public, file_bytes=_FILE_BYTES))
    for name in manifest.files_below(out):
        if name.split("/")[-1] == manifest.COMMIT:
            storage.write_text(out / name, "Checkpoint commit was successful\n")  # Orbax's own names the machine's folder
    return out


def without_places(config: Config) -> Config:
    """The config with absolute paths and buckets replaced: a dataset's by `datasets/NAME`, others by their last part."""
    data = _name_dataset(config.data.path)
    reference = config.eval.reference
    if config.data.path and reference.startswith(config.data.path):
        reference = data + reference.removeprefix(config.data.path)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=data),
        eval=dataclasses.replace(config.eval, reference=_name(reference), weights=_name(config.eval.weights)),
        repa=dataclasses.replace(config.repa, encoder=_name(config.repa.encoder)),
        train=dataclasses.replace(config.train, init_from=""),
    )


def _name(path: str) -> str:
    elsewhere = os.path.isabs(path) or not storage.is_local(path)
    return os.path.basename(path.rstrip("/")) if elsewhere else path


def _name_dataset(path: str) -> str:
    name = _name(path)
    return path if name == path else f"{_DATASETS}/{name}"


def describe(record: items.Record, *, name: str, address: str, step: int, weights: str, params: Params) -> str:
    """The model card as Markdown: what is known, and TODO where only a person knows."""
    config, model = record.config, record.config.model
    count = sum(x.size for x in jax.tree.leaves(params))
    height, width = model.image_size
    drawing = config.sample
    options = f"steps={drawing.steps}, guidance={drawing.guidance}, interval={drawing.interval}, t_shift={drawing.t_shift}"
    labels = [0, model.num_classes - 1] if model.num_classes > 1 else [0]
    averaged = f"exponential moving average, decay {config.optim.ema_decays[0]}" if weights != "raw" else "the last update's"
    network = {
        "parameters": f"{count:,}, stored in {record.stored}",
        "images": f"{height} x {width} pixels, {_plural(model.num_classes)}",
        "backbone": f"{model.depth} blocks of width {model.width}, {model.num_heads} heads, patches of {model.patch_size}",
        "head": f"{model.head}, {model.placement}",
        "predicts": {"v": "the velocity", "x": "the image", "asym": "the image", "eps": "the noise"}[model.prediction],
        "weights": averaged,
    }
    images = step * config.data.batch_size
    training = {
        "data": f"{os.path.basename(config.data.path) or 'TODO'}{_fingerprint(record.data)}",
        "steps": f"{step:,} of {config.data.batch_size} images ({images:,} images)" if record.data or step else "TODO",
        "optimizer": f"Adam, learning rate {config.optim.learning_rate}, {config.optim.schedule}",
        "precision": model.dtype,
        "software": f"dip_jax {__version__}, jax {jax.__version__}; the whole config is in config/metadata",
    }
    return _CARD.format(
        title=name.replace("_", " "),
        address=address,
        labels=labels,
        count=len(labels),
        height=height,
        width=width,
        options=options,
        model=_rows(network),
        training=_rows(training),
        classes=_list_classes(record.classes, model.num_classes),
    )


def _rows(table: dict[str, str]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in table.items())


def _plural(classes: int) -> str:
    return "1 class" if classes == 1 else f"{classes} classes"


def _fingerprint(data: dict) -> str:
    return f" (fingerprint {data['fingerprint'][:16]})" if "fingerprint" in data else ""


def _list_classes(names: Sequence[str], count: int) -> str:
    if not names:
        return f"0 to {count - 1}. TODO: what they show."
    return "\n".join(f"{number}. {name}" for number, name in enumerate(names)) if count > 1 else names[0]
