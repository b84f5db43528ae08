"""What a run trains, on its mesh: model, teacher, optimizer, the step of them all, and the state that it begins with."""

import jax

from dip_jax.checkpoints import averages, checkpoint
from dip_jax.config import Config
from dip_jax.data import prepared
from dip_jax.models import dip, starting
from dip_jax.runtime import distributed
from dip_jax.training import optim, repa, state, step, subspace, workload

_NOISE = 1  # stream of the training noise, beside the initial weights


class Program:
    """Built from a config: `read_origin` where the run starts from another model, `compile`, a state, then `step` after `step`.

    Args:
        config: of the run, with its number of classes.
        mesh: where it runs.
        teacher: SHA-256 of the teacher's file, as a checkpoint remembers it.

    Attributes:
        model: what is trained.
        alignment: what the teacher adds to the loss; None without one.
        digest: SHA-256 of the teacher's file; None without one.

    Raises:
        UserError: the teacher's file is missing, holds another network, or differs between hosts.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, *, teacher: str | None):
        self._config, self._mesh, self._origin = config, mesh, None
        self.model = dip.from_config(config.model)
        self._teacher = distributed.on_all(lambda: repa.open_teacher(config.repa, config.model, known=teacher))
        self.alignment = self._teacher.alignment if self._teacher else None
        self.digest = self._teacher.digest if self._teacher else None
        distributed.require_same({"repa.encoder SHA-256": self.digest})
        self._optimizer = optim.make_optimizer(config.optim, total_steps=config.train.steps)

    def read_origin(self, classes: list[str]) -> None:
        """Reads the weights of `train.init_from`, if there is one, once they are seen to fit; says what carries over."""
        self._origin = checkpoint.read_origin(self._config.train)
        if self._origin is not None:
            params = jax.eval_shape(self.model.init, jax.random.key(0))
            said = starting.begin(params, self._origin, model=self._config.model, classes=classes)[1]
            distributed.say(f"{said}: from {self._config.train.init_from}")

    def compile(self) -> None:
        """Everything that the step needs on the devices but the state; says what it will cost."""
        config = self._config
        self._shardings = state.state_shardings(
            self.model,
            self._optimizer,
            self._mesh,
            zero1=config.mesh.zero1,
            averages=len(config.optim.ema_decays),
            alignment=self.alignment,
        )
        self._arrays = state.abstract_state(self.model, self._optimizer, self._shardings, alignment=self.alignment)
        self._formats = state.formats(self._arrays)
        self._frozen, places = repa.place_teacher(self._teacher, self._mesh)
        self._step = step.compile_train_step(
            self.model,
            self._optimizer,
            self._formats,
            self._mesh,
            objective=config.flow,
            optim=config.optim,
            only=config.train.only,
            alignment=self.alignment,
            frozen=places,
        )
        distributed.on_main(self._describe)
        replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._key = jax.jit(lambda: jax.random.fold_in(jax.random.key(config.train.seed), _NOISE), out_shardings=replicated)()

    def _describe(self) -> None:
        parts = (self._config, self.model, self._optimizer, self._shardings)
        distributed.say(workload.describe_work(*parts, alignment=self.alignment, mesh=self._mesh))

    def step(self, now: state.TrainState, batch: dict[str, jax.Array]) -> tuple[state.TrainState, dict[str, jax.Array]]:
        """One update: the state after it, and its metrics."""
        return self._step(now, batch, self._key, *self._frozen)

    def first_state(self, dataset: prepared.Dataset, workdir) -> state.TrainState:
        """The state before the first step: from the seed, and from the origin what carries over."""
        seed, model = self._config.train.seed, self._config.model
        made = state.init_sharded(self.model, self._optimizer, seed, self._shardings, alignment=self.alignment)
        first = made.params
        if self._origin:
            first = starting.begin(first, self._origin, model=model, classes=dataset.classes)[0]
        first = subspace.prepare(first, self._origin, model, dataset, workdir)
        made = made if first is made.params else state.with_first_weights(made, first, self._shardings)
        return jax.device_put(made, self._formats)

    def restored_state(self, checkpoints: checkpoint.Checkpoints, found: checkpoint.Found) -> state.TrainState:
        """The state of a checkpoint, also of one whose optimizer clipped otherwise, that had other averages, or a teacher."""
        was, now = found.record.config.optim, self._config.optim
        target = self._arrays.replace(opt_state=optim.renest(self._arrays.opt_state, old=now, new=was))
        dropped = found.record.config.repa.weight and not self.alignment
        names = averages.carried_over(was.ema_decays, now.ema_decays)
        restored = checkpoints.restore(found, target, partial=bool(dropped), names=names)
        restored = restored.replace(opt_state=optim.renest(restored.opt_state, old=was, new=now))
        return jax.device_put(restored, self._formats)
