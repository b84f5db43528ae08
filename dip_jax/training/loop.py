"""The loop: batches through the step, metrics one step late, and what happens beside it.

Saving, sampling and evaluating every so many steps; stopping when a signal asks; rolling back when the numbers go bad.
"""

import contextlib
import json
from collections.abc import Iterator

import jax

from dip_jax.checkpoints import checkpoint
from dip_jax.config import Config, to_dict
from dip_jax.data import order, pipeline
from dip_jax.errors import Exit, Interrupted
from dip_jax.runtime import distributed, profiling, storage, writers
from dip_jax.runtime.watchdog import Watchdog
from dip_jax.training import bad_numbers, optim, pace, program, showing, subspace, workload

_PATIENCE = 10.0  # the watchdog waits this many times longer for compiling, saving and sampling


class Run:
    """One run of the loop: `prepare`, then `loop`."""

    def __init__(self, config: Config, workdir, mesh, dataset, signals, checkpoints, ledger):
        self._config, self._workdir, self._mesh, self._dataset = config, workdir, mesh, dataset
        self._signals, self._checkpoints, self._ledger = signals, checkpoints, ledger
        self._watchdog = Watchdog(config.train.watchdog_seconds)
        self._watch = bad_numbers.Watch(config.train)
        self._batches = self._writer = self._progress = None
        self._pending: tuple[int, dict[str, jax.Array], int] | None = None  # step, its metrics, bad records replaced by then
        self._step = self._replaced = 0  # steps done; bad records replaced before this start
        self._profiler = profiling.Profiler(
            workdir, planned=config.train.profile_steps, every=config.train.log_every, heard=signals.take_profile
        )

    def prepare(self, found: checkpoint.Found | None) -> None:
        """Everything up to the first step; cheap checks first."""
        config = self._config
        distributed.say(workload.describe_place(self._mesh))
        self._open_data(found, salt=found.record.data["salt"] if found else 0)
        distributed.say(f"data: {len(self._dataset):,} images, {config.model.num_classes} classes, {config.data.path}")
        known = found.record.data.get("teacher") if found else None
        self._program = program.Program(config, self._mesh, teacher=known)
        self._showing = showing.Show(config, self._program.model, self._mesh, self._dataset.classes)
        if not found:
            self._program.read_origin(self._dataset.classes)
        self._watchdog.beat(patience=_PATIENCE)
        self._program.compile()
        if distributed.is_main():
            storage.write_text(self._workdir / "config.json", json.dumps(to_dict(config), indent=1))
        self._start_from(found)

    def _open_data(self, found: checkpoint.Found | None, *, salt: int) -> None:
        config = self._config
        size = config.data.batch_size
        offset = order.find_offset(found.record.data, step=found.step, batch_size=size) if found else 0
        self._identity = order.identity(self._dataset, seed=config.train.seed, batch_size=size, salt=salt, offset=offset)
        if found:
            order.check_identity({**found.record.data, "salt": salt}, self._identity)
        if self._batches is not None:
            self._batches.close()
        self._batches = pipeline.batches(
            self._dataset,
            config.data,
            mesh=self._mesh,
            image_size=config.model.image_size,
            num_classes=config.model.num_classes,
            seed=config.train.seed,
            salt=salt,
            offset=offset,
            start_step=found.step if found else 0,
        )

    def _start_from(self, found: checkpoint.Found | None) -> None:
        """Puts the state, the counters and the tables where the checkpoint (or the seed) says."""
        self._step = found.step if found else 0
        self._watch.skipped = found.record.skipped if found else 0
        self._replaced = found.record.replaced if found else 0
        self._pending = None
        self._pace = pace.for_run(self._config, self._mesh, self._program.alignment, start=self._step, ledger=self._ledger)
        if found:
            self._state = self._program.restored_state(self._checkpoints, found)
            distributed.say(f"going on from step {found.step} of {self._workdir}")
        else:
            self._state = self._program.first_state(self._dataset, self._workdir)
        distributed.on_main(self._open_writers)

    def _open_writers(self) -> None:
        self._close_writers()
        self._writer = writers.Writer(self._workdir, resume_step=self._step, config=self._config)
        self._progress = writers.Progress(total=self._config.train.steps, start=self._step)

    def loop(self) -> None:
        """Steps until the last one, a signal, or numbers that stay bad."""
        train = self._config.train
        self._show(owed=True)
        self._watchdog.beat(patience=_PATIENCE)
        first = True
        while self._step < train.steps:
            self._ledger.at(self._step, compiling=first)
            self._stop_if_asked()
            if self._profiler.due(self._step):
                self._settle()
                with self._aside("profiling"):
                    self._profiler.turn(self._step)
            with self._pace.waiting(self._devices_idle):
                batch = next(self._batches)
            with jax.transfer_guard("allow" if jax.config.jax_debug_nans else "disallow"):  # it looks for a NaN op by op
                self._state, metrics = self._program.step(self._state, batch)
            self._step += 1
            self._settle()
            self._pending = (self._step, metrics, self._batches.replaced)
            self._watchdog.beat(patience=_PATIENCE if first else 1.0)
            self._checkpoints.check()
            if first:
                jax.block_until_ready(metrics)
                self._pace.restart(self._step)
            first = False
            if self._watch.exhausted:
                with self._aside("start_up"):
                    self._roll_back()
                continue
            if self._step == train.steps:
                self._save()
            elif self._step % self._config.checkpoint.every_steps == 0:
                self._settle()
                if not self._watch.streak:  # a rollback must reach back to before the trouble
                    self._save()
            self._show()
        self._ledger.at(self._step, compiling=False)
        with self._aside("profiling"):
            self._profiler.close(self._step)
        self._await_save()
        distributed.say(f"finished: {self._step} steps in {self._workdir}")

    def _stop_if_asked(self) -> None:
        asked = self._signals.requested
        if jax.process_count() > 1:  # every process stops at the step that they agree on
            asked = (asked or Exit.PREEMPTED) if distributed.preempted(self._step) else None
        if asked is None:
            return
        if self._step == 0:
            raise Interrupted(f"no step was done in {self._workdir} yet: run the same command again to begin", code=asked)
        self._save()
        self._await_save()
        raise Interrupted(f"saved step {self._step} in {self._workdir}: run the same command again to go on", code=asked)

    def _await_save(self) -> None:
        with self._aside("saving"):
            self._checkpoints.wait()

    def _settle(self) -> None:
        """Fetches the metrics of the step before, so that the devices never wait for the host, and writes its row."""
        if self._pending is None:
            return
        (number, metrics, replaced), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        updates = number - 1 - self._watch.skipped  # before this one; a skipped one moves no schedule on
        suspect = self._watch.observe(values)
        logged = number % self._config.train.log_every == 0
        counts = {"skipped": self._watch.skipped, "replaced": self._count_replaced(replaced)} if logged else {}
        if not distributed.is_main():
            return
        if suspect:
            self._keep_for_inspection(number, values, suspect)
        if logged:
            rate = optim.learning_rate_after(updates, self._config.optim, total_steps=self._config.train.steps)
            speed = self._pace.measure(number)
            self._progress.note(speed)
            rest = {"learning_rate": rate} | speed | pace.device_memory() | self._ledger.shares()
            self._writer.scalars(number, values | counts | rest)
        self._progress.update(number, values)

    def _devices_idle(self) -> bool:
        return self._pending is None or self._pending[1]["loss"].is_ready()

    def _count_replaced(self, here: int) -> int:
        """Bad records replaced over the whole run, `here` of them by this process since it started."""
        return self._replaced + (distributed.total(here) if self._config.data.on_bad_record == "replace" else 0)

    def _keep_for_inspection(self, number: int, values: dict[str, float], reason: str) -> None:
        drawn_by = {key: self._identity[key] for key in ("batch_size", "seed", "salt", "offset")}
        records = order.batch_indices(len(self._dataset), **drawn_by, step=number - 1).tolist()
        path = bad_numbers.keep_for_inspection(
            self._workdir, number, reason=reason, metrics=values, order=drawn_by, records=records
        )
        self._progress.say(f"step {number}: {reason}; its records are in {path}")

    def _roll_back(self) -> None:
        """After `train.bad_steps` bad steps in a row: the last good checkpoint and other data, or the end."""
        self._checkpoints.wait()
        found = self._checkpoints.find()
        origin = found.step if found else 0
        bad = f"{self._config.train.bad_steps} updates in a row were not finite at step {self._step}"
        if not self._watch.roll_back(origin, skipped=found.record.skipped if found else 0):
            raise Interrupted(
                f"{bad}; the last checkpoint is step {origin}: lower optim.learning_rate or set optim.grad_clip, and look at "
                f"{self._workdir / 'inspect'}",
                code=Exit.NUMERIC_ABORT,
            )
        distributed.say(f"{bad}: back to step {origin}, with other data")
        self._open_data(found, salt=self._identity["salt"] + 1)
        self._start_from(found)

    def _save(self) -> None:
        """Starts a save of the current step; never of numbers that are not finite."""
        self._settle()
        with self._aside("saving"):
            if not bad_numbers.all_finite(self._state):
                raise Interrupted(
                    f"the state is not finite at step {self._step}: nothing saved, the checkpoint before stays",
                    code=Exit.NUMERIC_ABORT,
                )
            replaced = self._count_replaced(self._batches.replaced)
            digests = {"teacher": self._program.digest, "subspace": subspace.fingerprint(self._state.params)}
            origin = self._identity | {name: digest for name, digest in digests.items() if digest}
            counts = {"skipped": self._watch.skipped, "replaced": replaced}
            record = checkpoint.Record(self._config, origin, **counts, classes=tuple(self._dataset.classes))
            self._checkpoints.save(self._step, self._state, record)

    def _show(self, *, owed: bool = False) -> None:
        """The picture and the metrics that are due at this step; `owed`: where they are not there yet."""
        acts = {"samples": self._show_samples, "metrics": self._evaluate}
        wanted = (self._config.train, self._workdir, self._step)
        for name in showing.find_owed(*wanted) if owed else showing.due(wanted[0], self._step):
            acts[name]()

    def _show_samples(self) -> None:
        """A picture with a row of samples per class."""
        self._settle()
        with self._aside("showing"):
            picture = self._showing.picture(self._state.ema)
            if distributed.is_main():
                self._writer.image(self._step, showing.PICTURE, picture)

    def _evaluate(self) -> None:
        """Metrics of the average and of the last weights: a row of `eval.jsonl`."""
        self._settle()
        values: dict[str, float] = {}
        for prefix, params in (("", self._state.ema), ("raw_", self._state.weights)):
            with self._aside("showing"):
                found = self._showing.metrics(params)
                values |= {prefix + name: value for name, value in found.items() if not (prefix and name == "N")}
        if distributed.is_main():
            self._writer.scalars(self._step, values, table="eval")

    @contextlib.contextmanager
    def _aside(self, part: str) -> Iterator[None]:
        """Work beside the steps, a part of the ledger's: the watchdog is patient and the clock of images/s stands still."""
        self._watchdog.beat(patience=_PATIENCE)
        with self._ledger.part(part):
            yield
        self._watchdog.beat()
        self._pace.restart(self._step)

    def _close_writers(self) -> None:
        for each in (self._writer, self._progress):
            if each is not None:
                each.close()

    def close(self) -> None:
        """Ends threads and workers and flushes what was written."""
        self._watchdog.stop()
        self._profiler.close(self._step)
        if self._batches is not None:
            self._batches.close()
        self._close_writers()
