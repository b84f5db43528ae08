"""How long a step takes if an accelerator does a stated part of what it can on paper. Nothing here is measured."""

import dataclasses
import math
from collections.abc import Sequence

from dip_jax.planning.hlo import Collective
from dip_jax.runtime.accelerators import Accelerator

EFFICIENCY = 0.4  # of the peak FLOPs: what well-tuned diffusion transformers reach
LINK_EFFICIENCY = 0.8  # of a link's rate


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one step, and what share of its work is talking."""

    compute: float  # products at EFFICIENCY of the peak
    update: float  # state and gradients once through memory in each direction
    communication: float
    fits: bool

    @property
    def best(self) -> float:
        """All communication hidden behind compute."""
        return max(self.compute + self.update, self.communication)

    @property
    def worst(self) -> float:
        """None of it hidden."""
        return self.compute + self.update + self.communication

    @property
    def communication_share(self) -> float:
        """Of the time when nothing is hidden."""
        return self.communication / self.worst


def predict(
    device: Accelerator, *, flops: int, collectives: Sequence[Collective], state_bytes: int, total_bytes: int
) -> Prediction:
    """The step on one kind of device; latencies, which matter for small messages, are left out.

    Args:
        flops: products of one step, per device.
        collectives: of one step.
        state_bytes: parameters, optimizer, average and gradients, per device.
        total_bytes: all memory in use, per device.
    """
    talking = math.fsum(one.sent / (LINK_EFFICIENCY * device.ring_rate(one.group)) for one in collectives)
    return Prediction(
        compute=flops / (EFFICIENCY * device.flops),
        update=2 * state_bytes / device.memory_rate,
        communication=talking,
        fits=total_bytes < device.memory,
    )
