"""What accelerators can do on paper, from the makers' pages; nothing here is measured.

v5p, v6e     docs.cloud.google.com/tpu/docs/v5p and /v6e: bf16 peak, HBM, bidirectional ICI bandwidth per chip, 3-D and 2-D
             torus
H100, H200   NVIDIA's data sheets of the SXM modules: dense bf16, HBM, NVLink 900 GB/s both ways; of DGX: 8 to a node, each
             with a network adapter of 400 Gb/s
"""

import dataclasses
from collections.abc import Sequence


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

# What JAX calls a device (`device.device_kind`) -> which of the above it is. A slower module of the same name (PCIe, NVL) has
# another kind, and no row.
_KINDS = {
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}


def peak_flops(device_kind: str) -> float | None:
    """bf16 products per second of a device; None where it is not known, such as a CPU's."""
    return ACCELERATORS[_KINDS[device_kind]].flops if device_kind in _KINDS else None
