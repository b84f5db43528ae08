"""What is made beside the training at some steps: a picture of samples, and metrics of a few."""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from dip_jax.config import Config, Train
from dip_jax.metrics import cache, image_sets, judge
from dip_jax.models import dip
from dip_jax.reporting import figures
from dip_jax.runtime import distributed, writers
from dip_jax.sampling import trajectories
from dip_jax.typing import Params

PICTURE = "samples"  # name of the pictures in images/
_SAMPLES_PER_CLASS = 6
_CLASSES_SHOWN = 10


def due(train: Train, step: int) -> list[str]:
    """What is made beside the training at a step: "samples", "metrics"."""
    marks = {"samples": train.sample_every, "metrics": train.eval_every}
    return [name for name, every in marks.items() if every and step and (step % every == 0 or step == train.steps)]


def find_owed(train: Train, workdir: epath.Path, step: int) -> list[str]:
    """What was due at a step and is not there, because the run ended between saving and that. All processes must call it."""
    made = {
        "samples": lambda: writers.image_path(workdir, step, PICTURE).exists(),
        "metrics": lambda: any(row["step"] == step for row in writers.read_rows(workdir / "eval.jsonl")),
    }
    return [name for name in due(train, step) if not distributed.agree(int(distributed.is_main() and made[name]()))]


class Show:
    """Draws from the weights of a running training, on all its devices; the same noise every time.

    Raises:
        UserError: in every process, where metrics are wanted and their reference or weights file is missing.
    """

    def __init__(self, config: Config, model: dip.DiP, mesh: jax.sharding.Mesh, class_names: Sequence[str]):
        self._config, self._model, self._mesh, self._class_names = config, model, mesh, class_names
        self._judge = None
        if config.train.eval_every:  # opened on the host that judges
            samples = {"name": "this run", "image_shape": (*config.model.image_size, 3), "patch_size": config.model.patch_size}
            folder = cache.default_folder()
            self._judge = distributed.on_main(lambda: judge.open_judge(config.eval, **samples, cache=folder))

    def picture(self, params: Params) -> np.ndarray:
        """A row of samples per class, uint8 [H, W, 3]."""
        shown = range(min(self._config.model.num_classes, _CLASSES_SHOWN))
        labels = np.repeat(np.array(shown, np.int32), _SAMPLES_PER_CLASS)
        return np.asarray(figures.class_grid(figures.Labelled(self._draw(params, labels), labels), self._class_names))

    def metrics(self, params: Params) -> dict[str, float | int]:
        """Metrics of as many samples as `eval` says, in the main process; the others wait for it and get none."""
        labels = np.arange(self._config.eval.num_samples, dtype=np.int32) % self._config.model.num_classes
        images = image_sets.from_array(self._draw(params, labels), labels)
        return distributed.on_main(lambda: self._judge(images).metrics) or {}

    def _draw(self, params: Params, labels: np.ndarray) -> np.ndarray:
        options = self._config.sample
        batches = trajectories.draw_batches(self._model, params, labels=labels, seed=0, options=options, mesh=self._mesh)
        return np.concatenate([images for _, images in batches])
