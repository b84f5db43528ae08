"""Other trackers beside TensorBoard by one seam, `TRACKERS`: Weights & Biases and MLflow, optional packages both.

Where they write to they take from their own environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, ...). The id
of the run lies in `WORKDIR/tracker.json`, so that every start goes on with the same one. Neither can take a step back: what was
told once is not told again when a run goes on from a checkpoint before. `metrics.jsonl` stays the truth: a kill may lose what
W&B had not written yet, a second's worth, and a tracker that fails is a line on stderr, once; the run goes on without it.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from dip_jax.errors import UserError, reason
from dip_jax.runtime import storage

_FILE = "tracker.json"
_PROJECT = "dip_jax"  # project or experiment where the environment names none


class Backend(Protocol):
    """What a tracker can do."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


class _Wandb:
    def __init__(self, run: str, workdir: epath.Path, config: Mapping[str, Any]):
        import wandb

        wanted = {"console": "off", "x_transaction_log_flush_interval": 1.0}  # our lines are not theirs; 15 s would be lost
        self._image, self._committed, self._late = wandb.Image, 0, {}
        self._run = wandb.init(
            id=run,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", workdir.name),
            dir=os.fspath(workdir) if storage.is_local(workdir) else None,
            config=dict(config),
            settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}),
        )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """W&B takes one row a step, and a kill loses a row that is not committed: what comes late goes into the next one."""
        if step == self._committed:
            self._late |= values
            return
        self._run.log({**values, **self._late}, step=step, commit=True)
        self._committed, self._late = step, {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._log(step, {f"images/{name}": self._image(pixels)})

    def close(self) -> None:
        if self._late:
            self._log(self._committed + 1, {})
        self._run.finish()


class _Mlflow:
    def __init__(self, run: str, workdir: epath.Path, config: Mapping[str, Any]):
        from mlflow import MlflowClient, entities

        self._client, self._metric = MlflowClient(), entities.Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.search_runs([self._experiment(name)], f"tags.dip_jax = '{run}'")  # MLflow makes ids itself
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(self._experiment(name), tags={"dip_jax": run}, run_name=workdir.name).info.run_id
            self._client.log_dict(self._id, dict(config), "config.json")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(key, value, now, step) for key, value in values.items()])

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._client.log_image(self._id, pixels, artifact_file=f"images/{name}_{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


@dataclasses.dataclass(frozen=True)
class _Kind:
    package: str
    install: str
    open: Callable[..., Backend]
    way_out: str


TRACKERS = {
    "wandb": _Kind("wandb", "wandb", _Wandb, "`wandb login`, or WANDB_MODE=offline in the environment"),
    "mlflow": _Kind("mlflow", "mlflow-skinny", _Mlflow, "MLFLOW_TRACKING_URI in the environment names the server"),
}


def require(name: str) -> None:
    """Checks that the package of a tracker is there; "" is none.

    Raises:
        UserError: if it is not.
    """
    if name and importlib.util.find_spec(TRACKERS[name].package) is None:
        raise UserError(f"train.tracker={name} needs another package: pip install {TRACKERS[name].install}")


class Tracker:
    """A tracker that is told every step once.

    Args:
        name: row of `TRACKERS`.
        workdir: of the run; its `tracker.json` knows the run's id.
        config: JSON values, shown beside the run.
        logged: the last step that `metrics.jsonl` had when the run was interrupted.

    Raises:
        UserError: if the tracker does not begin, such as without a login.
    """

    def __init__(self, name: str, workdir: epath.Path, config: Mapping[str, Any], *, logged: int):
        path = workdir / _FILE
        known = json.loads(path.read_text()) if path.exists() else {}
        new = name not in known
        run = uuid.uuid4().hex[:12] if new else known[name]["run"]
        self._told = 0 if new else max(known[name]["step"], logged)
        try:
            self._backend: Backend | None = TRACKERS[name].open(run, workdir, config)
        except Exception as error:
            raise UserError(f"train.tracker={name} does not begin ({reason(error)}): {TRACKERS[name].way_out}") from error
        storage.write_text(path, json.dumps(known | {name: {"run": run, "step": self._told}}))

    def scalars(self, step: int, values: Mapping[str, float | None], *, table: str) -> None:
        """A row of a table, without what is not a number."""
        numbers = {f"{table}/{key}": value for key, value in values.items() if value is not None}
        self._tell(step, lambda backend: backend.scalars(step, numbers))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""
        self._tell(step, lambda backend: backend.image(step, name, pixels))

    def close(self) -> None:
        """Flushes and ends the run."""
        self._tell(self._told + 1, lambda backend: backend.close())
        self._backend = None

    def _tell(self, step: int, what: Callable[[Backend], None]) -> None:
        if self._backend is None or step <= self._told:
            return
        try:
            what(self._backend)
        except Exception as error:
            self._backend = None
            print(f"the tracker failed at step {step} and is told no more: {reason(error)}", file=sys.stderr, flush=True)
