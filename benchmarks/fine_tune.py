"""What `--init_from` gives a model of other classes, image or patch size: the loss before its first update.

    python benchmarks/fine_tune.py --checkpoint=runs/demo --dataset=datasets/photo_crops [--images=192]

The validation crops, enlarged (cubic) where the new model's images are larger; times, labels and, at the same size, noise are
the same for all. `source` is the other model on its own crops, `started` the new one with what carried over, `fresh` the new
one from its seed.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from dip_jax import config, flow
from dip_jax.checkpoints import checkpoint, directories
from dip_jax.data import prepared
from dip_jax.models import dip, starting

_BATCH = 16


def mean_loss(model: dip.DiP, params: dict, images: np.ndarray, labels: np.ndarray) -> float:
    """Equation 5 over all images, no label dropped."""
    of = model.config
    no_drop = config.Flow(label_dropout=0.0)

    @jax.jit
    def loss(params, key, x, y):
        return flow.loss(
            lambda x_t, t, y: model.apply(params, x_t, t, y), flow.corrupt(key, x, y, flow=no_drop, model=of), model=of
        )

    shape = (len(images), *of.image_size, 3)
    images = np.clip(jax.image.resize((images / 127.5 - 1).astype(np.float32), shape, "cubic"), -1, 1)
    parts = range(0, len(images), _BATCH)
    losses = [loss(params, jax.random.key(i), images[i : i + _BATCH], labels[i : i + _BATCH]) for i in parts]
    return float(np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="workdir, step or release")
    parser.add_argument("--dataset", required=True, help="DATASET_DIR with a validation split")
    parser.add_argument("--images", type=int, default=192, help=f"a multiple of {_BATCH}")
    options = parser.parse_args()
    step = directories.find(options.checkpoint, verify=True, report=print, unread=("state",))
    model, params = checkpoint.load(step, verify=False, dtype="float32")
    origin = starting.Origin(model.config, params, checkpoint.read_record(step).classes)
    data = prepared.open_dataset(pathlib.Path(options.dataset) / "validation")
    chosen = np.linspace(0, len(data) - 1, options.images).astype(int)
    crops = [data[int(i)] for i in chosen]
    images, labels = np.stack([c["image"] for c in crops]), np.asarray([c["label"] for c in crops], np.int32)
    of = model.config
    twice, wider = tuple(2 * side for side in of.image_size), of.num_classes + 2
    cases = {
        f"{of.num_classes} classes to {wider}": {"num_classes": wider},
        "images twice as large": {"image_size": twice},
        "images and patches twice as large": {"image_size": twice, "patch_size": 2 * of.patch_size},
    }
    source = mean_loss(model, params, images, labels)
    rows = []
    for name, changes in cases.items():
        new = dip.from_config(dataclasses.replace(of, **changes))
        fresh = jax.jit(new.init)(jax.random.key(0))
        started, said = starting.begin(fresh, origin, model=new.config, classes=())
        started = jax.tree.map(jnp.asarray, started)
        losses = [source, *(mean_loss(new, each, images, labels) for each in (started, fresh))]
        rows.append([name, *(f"{loss:.3f}" for loss in losses), said])
    print(measuring.table(("change", "source", "started", "fresh", "said"), rows))


if __name__ == "__main__":
    main()
