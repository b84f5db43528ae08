"""Train a model, or go on where it stopped.

Examples:
  python -m dip_jax train --config=configs/demo.py:dit --workdir=runs/demo/dit
  python -m dip_jax train --config=configs/demo.py:dit --workdir=runs/demo/dit \\
      --config.train.steps=4000 --allow_change=train.steps

The same command goes on after Ctrl-C (saves first), SIGTERM or SIGUSR1 (saves, exit code 85), or a crash: bit-exact on the same
devices. Options that decide what is learnt may not change within a workdir; --allow_change names those that may, one by one.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Collection

import jax
from absl import flags as absl_flags
from etils import epath

from dip_jax.checkpoints import checkpoint, directories
from dip_jax.config import Config, to_dict
from dip_jax.data import prepared, workers
from dip_jax.errors import UserError
from dip_jax.metrics import features
from dip_jax.runtime import command_line, distributed, goodput, sharding, storage, trackers
from dip_jax.runtime.lock import Lock
from dip_jax.runtime.signals import Signals
from dip_jax.training import config_change, loop, showing


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Adds the command's flags."""
    command_line.define_config(flags)
    absl_flags.DEFINE_string("workdir", None, "where checkpoints, metrics and images go", flag_values=flags)
    absl_flags.DEFINE_string(
        "init_from",
        "",
        "checkpoint whose weights a new run starts from: a DiT-only one, or one of other classes, image or patch size",
        flag_values=flags,
    )
    absl_flags.DEFINE_enum("init_weights", "ema", ("ema", "raw"), "which of that checkpoint's weights", flag_values=flags)
    absl_flags.DEFINE_list(
        "allow_change", [], "config keys that may differ from the workdir's, such as optim.learning_rate", flag_values=flags
    )
    command_line.define_processes(flags)


def run(flags: absl_flags.FlagValues) -> None:
    """The command."""
    if not flags.workdir:
        raise UserError("--workdir is missing: name a directory, such as --workdir=runs/demo")
    storage.require_folder_name(flags.workdir, flag="--workdir")
    config = command_line.read_config(flags)
    if flags.init_from:
        start = {"init_from": str(storage.absolute(flags.init_from)), "init_weights": flags.init_weights}
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, **start))
    train(config, workdir=flags.workdir, allow_change=flags.allow_change)


def with_classes(config: Config, dataset: prepared.Dataset) -> Config:
    """The config with the dataset's number of classes where it leaves that open (0): what is built, saved and compared."""
    if config.model.num_classes:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=dataset.num_classes))


def train(config: Config, *, workdir: epath.PathLike, allow_change: Collection[str] = ()) -> None:
    """Trains to `config.train.steps`, going on from the newest undamaged checkpoint of `workdir`.

    Everything that can be wrong with the call is checked before the first compilation.

    Args:
        config: what to train.
        workdir: one run each; created where missing.
        allow_change: config keys that may differ from those of the checkpoint.

    Raises:
        UserError: if config, data, devices, workdir and checkpoint do not fit together, or a save fails.
        Interrupted: after saving, by a signal (85, 130); because the numbers are bad for good (86) or another process died (1).
    """
    workers.end_if_unguarded()
    began = time.monotonic()
    workdir = storage.absolute(workdir)
    distributed.start()
    devices = jax.devices()
    with contextlib.ExitStack() as stack:
        if jax.config.jax_debug_nans:  # what JAX traces without it leaves it off in this thread, unless that was told as well
            stack.enter_context(jax.debug_nans(True))
        signals = stack.enter_context(Signals(shared=jax.process_count() > 1))
        distributed.require_same(
            {"config": to_dict(config), "code": distributed.code_version(), "jax": jax.__version__, "devices": len(devices)}
        )
        mesh = sharding.make_mesh(config.mesh, devices)
        sharding.check_split(
            mesh.shape, model=config.model, batch_size=config.data.batch_size, accumulate=config.optim.accumulate
        )
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(sharding.use_rules(config.mesh.rules))
        size = config.model.image_size[0]
        if config.model.attention == "cudnn" and devices[0].platform != "gpu":
            raise UserError(
                f"model.attention=cudnn needs a GPU but the devices are {devices[0].platform}: set model.attention=auto"
            )
        features.require_known("eval.features", config.eval.features)
        distributed.on_main(lambda: trackers.require(config.train.tracker))
        if config.train.eval_every and not epath.Path(config.eval.reference or "/none/").exists():
            raise UserError(
                f"train.eval_every={config.train.eval_every} needs eval.reference={config.eval.reference!r} to exist: "
                "a dataset directory, a folder of pictures, or an .npz"
            )
        dataset = distributed.on_all(
            lambda: prepared.open_dataset(config.data.path, image_size=size, source=config.data.source)
        )
        distributed.require_same({"data.fingerprint": dataset.fingerprint})
        config = with_classes(config, dataset)
        if config.train.only != "all" and not config.train.init_from:
            raise UserError(f"train.only={config.train.only} trains a part of a finished model: name it by --init_from")
        lock = Lock(workdir)
        distributed.on_main(lambda: (storage.require_writable(workdir), lock.acquire()))
        stack.callback(lock.release)
        stack.callback(_leave_no_trace, workdir)
        distributed.require_shared(workdir, flag="--workdir")
        checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
        stack.callback(checkpoints.close)
        found = checkpoints.find()
        if found:
            config_change.check(found.record.config, config, allowed=allow_change)
        if found and found.step >= config.train.steps and not showing.find_owed(config.train, workdir, found.step):
            distributed.say(f"{workdir} is finished: it has all {found.step} steps")
            return
        ledger = stack.enter_context(goodput.recording(workdir if distributed.is_main() else None, began=began))
        job = loop.Run(config, workdir, mesh, dataset, signals, checkpoints, ledger)
        stack.callback(job.close)
        job.prepare(found)
        job.loop()


def _leave_no_trace(workdir: epath.Path) -> None:
    """Takes away what a start that came to nothing left: an empty `checkpoints/`, the lock (held still), the empty workdir."""
    if not distributed.is_main() or not storage.is_local(workdir) or (workdir / "config.json").exists():
        return
    with contextlib.suppress(OSError):  # not empty: something is in there that is not ours to judge
        with contextlib.suppress(FileNotFoundError):  # the start did not come that far
            os.rmdir(workdir / directories.ROOT)  # epath's would look first and then delete whatever is there
        os.unlink(workdir / "lock")
        os.rmdir(workdir)
