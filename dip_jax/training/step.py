"""One training step on one page: uint8 batch -> loss -> gradients -> AdamW -> EMA, or nothing at all if a number is bad."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from dip_jax import flow
from dip_jax.config import Flow, Optim
from dip_jax.runtime import sharding, target
from dip_jax.training import parts as trained
from dip_jax.training.losses import Losses, losses
from dip_jax.training.optim import ema_decays
from dip_jax.training.repa import Alignment, without_projector
from dip_jax.training.state import TrainState
from dip_jax.typing import Images, Params, PRNGKey, RawImages

Metrics = dict[str, Float[Array, ""]]
Batch = dict[str, Array]  # {"image": uint8 [B, H, W, C], "label": int32 [B]}


def to_float(image: RawImages) -> Images:
    """uint8 pixels to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def train_step(
    state: TrainState,
    batch: Batch,
    key: PRNGKey,
    frozen: Params | None = None,
    *,
    model: Any,
    optimizer: optax.GradientTransformation,
    objective: Flow,
    optim: Optim,
    alignment: Alignment | None = None,
    only: str = "all",
) -> tuple[TrainState, Metrics]:
    """One update. Pure; jit it through `compile_train_step`. `alignment` comes with its teacher's `frozen` parameters; `only`
    as `train.only`.

    The step's randomness is `key` folded with `state.step`, so step k of any run with this key draws the same noise. A
    non-finite loss or gradient norm leaves parameters, optimizer and averages as they were; the step still counts.

    Returns:
        The new state and float32 scalars: loss and its parts (`training/losses.py`), grad_norm (before
        clipping) and param_norm (of all that is trained, the projector too), and skipped (1 where the update was not applied).
    """
    key = jax.random.fold_in(key, state.step)
    image = sharding.constrain(to_float(batch["image"]), "batch", "height", "width", "channels")
    corrupted = flow.corrupt(key, image, batch["label"], flow=objective, model=model.config)
    told = {"model": model, "objective": objective, "alignment": alignment, "frozen": frozen}

    def minimised(params: Params, batch: Any) -> Losses:
        return losses(trained.hold(params, only), batch, **told)

    found, grads = _value_and_grad(minimised, state.params, (corrupted, image), parts=optim.accumulate)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(found["loss"]) & jnp.isfinite(grad_norm)

    def update():
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = trained.keep(state.params, optax.apply_updates(state.params, updates), only)
        own = without_projector(params)
        followed = (_follow(ema, own, d) for ema, d in zip(state.emas, ema_decays(optim, state.step), strict=True))
        emas = (trained.keep(old, new, only) for old, new in zip(state.emas, followed, strict=True))
        return params, opt_state, tuple(emas)

    def keep():
        return state.params, state.opt_state, state.emas

    params, opt_state, emas = _either(finite, update, keep)
    metrics = {
        **found,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, emas=emas), metrics


def _either(chosen: Bool[Array, ""], update: Callable[[], Any], keep: Callable[[], Any]) -> Any:
    """The result of `update` where `chosen`, else of `keep`.

    A branch on CPUs and in what is to suit all platforms: on two cores a select per array made this part five times slower. On
    accelerators the select, of values that the update reads in any case: a branch would have the state copied on its way in, on
    a TPU into layouts of its own, and a GPU's host would wait to hear which way to go.
    """
    if target.platform() in ("tpu", "gpu"):
        return jax.tree.map(functools.partial(jnp.where, chosen), update(), keep())
    return jax.lax.cond(chosen, update, keep)


def _follow(ema: Params, params: Params, decay: Float[Array, ""]) -> Params:
    """An average of the weights after an update."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def _value_and_grad(minimised: Callable[..., Losses], params: Params, batch: Any, *, parts: int) -> tuple[Losses, Params]:
    """Losses and gradient of the batch; with `parts` > 1 as the mean over micro-batches run one after the other."""

    def loss(params, batch):
        found = minimised(params, batch)
        return found["loss"], found

    def both(params, batch):
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return found, grads

    if parts == 1:
        return both(params, batch)

    def add(total, i):
        # Strided, so that every device keeps its own examples in each micro-batch.
        part = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:])[:, i], batch)
        return jax.tree.map(jnp.add, total, both(params, part)), None

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(both, params, batch))
    total, _ = jax.lax.scan(add, zero, jnp.arange(parts))
    return jax.tree.map(lambda a: a / parts, total)


def compile_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: Mesh,
    *,
    objective: Flow,
    optim: Optim,
    alignment: Alignment | None = None,
    frozen: Any = None,
    only: str = "all",
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step: the state donated and kept where `shardings` puts it, the batch split over devices, metrics replicated.

    It takes (state, batch, key), and with `alignment` its teacher's parameters, which lie where the shardings `frozen` say.

    Call it under `jax.set_mesh(mesh)` and `sharding.use_rules`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    batch = NamedSharding(mesh, sharding.spec(("batch",)))
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, objective=objective, optim=optim, alignment=alignment, only=only
    )
    placed = (shardings, {"image": batch, "label": batch}, replicated)
    return jax.jit(
        step,
        in_shardings=placed if alignment is None else (*placed, frozen),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=target.compiler_options(mesh.devices.flat[0].device_kind),
    )
