"""What is minimised: the flow loss, and what a config adds to it.

    L = L_f + a L_i + w L_repa,   L_f = L_v + f L_dct of the prediction, L_i the same of the second output        (1)

L_v is equation 5 of `flow.py`, f = `flow.frequency_weight` (`training/frequency.py`), w = `repa.weight` (`training/repa.py`),
and a = `flow.internal_weight` where the model has a second output (internal guidance, Zhou et al. 2025).
"""

from typing import Any

from jaxtyping import Array, Float

from dip_jax import flow
from dip_jax.config import Flow, Model
from dip_jax.training.frequency import frequency_loss
from dip_jax.training.repa import PROJECTOR, Alignment, without_projector
from dip_jax.typing import Images, Params

Losses = dict[str, Float[Array, ""]]


def losses(
    params: Params,
    batch: tuple[flow.Corrupted, Images],
    *,
    model: Any,
    objective: Flow,
    alignment: Alignment | None = None,
    frozen: Params | None = None,
) -> Losses:
    """Equation (1) under "loss", its parts as loss_flow, loss_frequency, loss_internal, loss_repa where there are several.

    Args:
        params: as the state has them, the projector included.
        batch: what the network is given, and the clean images.
        model, objective: what is trained, and the section of the config.
        alignment, frozen: representation alignment and its teacher's parameters.
    """
    corrupted, image = batch
    inputs = (corrupted.x_t, corrupted.t, corrupted.y)
    after = alignment.options.layer if alignment is not None else None
    said = model.apply_all(model.convert_once(without_projector(params)), *inputs, after=after)
    parts = _of_prediction(said.prediction, corrupted, model=model.config, objective=objective)
    if said.internal is not None:
        of_internal = _of_prediction(said.internal, corrupted, model=model.config, objective=objective)["loss"]
        parts |= {"loss": parts["loss"] + objective.internal_weight * of_internal, "loss_internal": of_internal}
    if alignment is not None:
        of_repa = alignment.loss(params[PROJECTOR], said.tokens, frozen, image)
        parts |= {"loss": parts["loss"] + alignment.options.weight * of_repa, "loss_repa": of_repa}
    return parts if len(parts) > 2 else {"loss": parts["loss"]}


def _of_prediction(prediction: Images, corrupted: flow.Corrupted, *, model: Model, objective: Flow) -> Losses:
    """The part of (1) that is asked of any prediction, under "loss", and its parts."""
    of_flow = flow.error(prediction, corrupted, model=model)
    if not objective.frequency_weight:
        return {"loss": of_flow, "loss_flow": of_flow}
    said, target = (flow.to_velocity(each, corrupted.x_t, corrupted.t, model=model) for each in (prediction, corrupted.target))
    of_frequency = frequency_loss(said, target)
    return {"loss": of_flow + objective.frequency_weight * of_frequency, "loss_flow": of_flow, "loss_frequency": of_frequency}
