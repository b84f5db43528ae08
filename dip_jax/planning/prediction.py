"""What accelerators can do on paper, and how long a step takes if they do a stated part of it.

Nothing here is measured. Peak rates come from the makers' pages:
    v5p, v6e     docs.cloud.google.com/tpu/docs/v5p and /v6e: bf16 peak, HBM, bidirectional ICI bandwidth per chip, 3-D and 2-D
                 torus
    H100, H200   NVIDIA's data sheets of the SXM modules: dense bf16, HBM, NVLink 900 GB/s both ways; of DGX: 8 to a node, each
                 with a network adapter of 400 Gb/s
"""

import dataclasses
import math
from collections.abc import Sequence

from dip_jax.planning.hlo import Collective

EFFICIENCY = 0.4  # of the peak FLOPs: what well-tuned diffusion transformers reach
LINK_EFFICIENCY = 0.8  # of a link's rate


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Peak rates of one device, per second; memory in bytes."""

    flops: float  # bf16 products
    memory: int
    memory_rate: float
    link_rate: float  # bytes that a device sends around one ring
    node: int = 0  # devices that share `link_rate`; 0: all
    network_rate: float = 0.0  # bytes that a device sends out of its node

    def ring_rate(self, group: Sequence[int]) -> float:
        """Bytes per second that a device of this group sends; of a node all devices of the group use their adapters."""
        inside = [device for device in group if self.node and device // self.node == group[0] // self.node]
        if not self.node or len(inside) == len(group):
            return self.link_rate
        return min(self.link_rate, len(inside) * self.network_rate)


# A ring of a torus sends both ways along one dimension: bidirectional bandwidth / 2 directions / dimensions * 2.
ACCELERATORS = {
    "v5p": Accelerator(flops=459e12, memory=95 * 2**30, memory_rate=2765e9, link_rate=1200e9 / 2 / 3),
    "v6e": Accelerator(flops=918e12, memory=32 * 10**9, memory_rate=1638e9, link_rate=800e9 / 2 / 2),
    "H100": Accelerator(flops=989e12, memory=80 * 10**9, memory_rate=3350e9, link_rate=450e9, node=8, network_rate=50e9),
    "H200": Accelerator(flops=989e12, memory=141 * 10**9, memory_rate=4800e9, link_rate=450e9, node=8, network_rate=50e9),
}


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
