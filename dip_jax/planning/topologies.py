"""Machines by the names that people rent them under, and the shapes in which their compilers know them.

v5e-16, v6e-8    chips, as Google Cloud counts these generations (it also writes v5litepod-16)
v5p-64           TensorCores: 32 chips of two, each of which is one device to JAX
2xv5e-256        two slices, joined by the data centre's network
h100x8, h200x8   GPUs, 8 to a node

Shapes: cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Memory is what the compilers grant a program; the clock is the peak
rate over what the chip's matrix units do in a cycle, and serves only to read estimated cycles as time.
"""

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from dip_jax.errors import UserError


@dataclass(frozen=True)
class Topology:
    """One machine.

    Attributes:
        name: as asked for.
        generation: row of `GENERATIONS` or `GPUS`.
        shape: chips along each dimension of one slice; for GPUs (1, nodes, GPUs in a node).
        slices: how many of them.
        memory: bytes that a program may use on one device.
        clock: cycles per second; 0 where the compiler estimates none.
    """

    name: str
    generation: str
    shape: tuple[int, ...]
    slices: int
    memory: int
    clock: float

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it; XLA's GPU compiler does otherwise."""
        return self.generation in GENERATIONS

    @property
    def devices(self) -> int:
        """Devices as JAX counts them: chips, or GPUs."""
        return self.slices * math.prod(self.shape)

    @property
    def described(self) -> str:
        """For people: v5p-64: 32 chips of v5p (64 TensorCores), 2x4x4."""
        shape = "x".join(map(str, self.shape))
        if not self.is_tpu:
            return f"{self.name}: {self.devices} {self.generation.upper()}, {self.shape[1]} node(s)"
        cores = f" ({2 * self.devices} TensorCores)" if GENERATIONS[self.generation].counts_cores else ""
        return f"{self.name}: {self.devices} chips of {self.generation}{cores}, {self.slices} slice(s) of {shape}"


@dataclass(frozen=True)
class Generation:
    """A generation of TPUs: the number in a slice's name -> its shape."""

    shapes: dict[int, tuple[int, ...]]
    memory: int
    clock: float
    counts_cores: bool = False  # two to a chip


_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    512: (4, 8, 8),
    1024: (8, 8, 8),
}
GENERATIONS = {
    "v5e": Generation(_FLAT, memory=int(15.75 * 2**30), clock=1.5e9),
    "v5p": Generation(_CUBES, memory=95 * 2**30, clock=1.75e9, counts_cores=True),
    "v6e": Generation(_FLAT, memory=int(31.25 * 2**30), clock=1.75e9),
}
GPUS = {"h100": 84_942_979_072, "h200": 150_754_820_096}  # bytes that the driver reports
NODE = 8

# A Hopper GPU as XLA asks the driver for it, in XLA's own text format; cuDNN's and CUDA's versions are those of JAX's wheels.
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def describe_devices(topology: Topology) -> list[Any]:
    """The machine's devices as JAX describes devices that are not there; for a process whose environment is `environment`.

    No device is touched: the compilers' own descriptions are read.
    """
    shape = "x".join(map(str, topology.shape))
    if not topology.is_tpu:
        rate = {"h100": 3_352_320_000_000, "h200": 4_800_000_000_000}[topology.generation]
        name = {"h100": "H100 80GB HBM3", "h200": "H200"}[topology.generation]
        target = _HOPPER.format(memory=topology.memory, bandwidth=rate, name=name)
        return topologies.get_topology_desc(
            platform="cuda", topology_name=topology.name, target_config=target, topology=shape
        ).devices
    more: dict[str, Any] = {} if topology.slices == 1 else {"num_slices": topology.slices}
    count = math.prod(topology.shape)
    if len(topology.shape) == 2 and count in (1, 8):  # one host with 1 or 8 chips; all others have 4
        more["chips_per_host_bounds"] = (*topology.shape, 1)
    return topologies.get_topology_desc(f"{topology.generation}:{shape}", "tpu", **more).devices


def environment(topology: Topology) -> dict[str, str]:
    """What the process that compiles needs in its environment: no device, no network, no log, no lock, no old result."""
    common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}
    if not topology.is_tpu:
        return {**common, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return {**common, **quiet, **alone}


def require_compiler(topology: Topology) -> None:
    """Refuses a machine whose compiler is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    wheels, extra = (("libtpu",), "aot-tpu") if topology.is_tpu else (("jax_cuda12_plugin", "jax_cuda13_plugin"), "aot-gpu")
    if not any(importlib.util.find_spec(wheel) for wheel in wheels):
        raise UserError(
            f"--topology={topology.name} needs that device's compiler, which is not installed ({wheels[0]}): "
            f"pip install -e '.[{extra}]'"
        )


def parse(name: str) -> Topology:
    """The machine of that name.

    Raises:
        UserError: for a name that no machine has, with those that are like it.
    """
    gpu = re.fullmatch(r"(h100|h200)x(\d+)", name)
    if gpu:
        kind, count = gpu.group(1), int(gpu.group(2))
        if not 1 <= count <= 1024 or (count > NODE and count % NODE):
            raise UserError(f"--topology={name}: GPUs come 1 to {NODE} in a node, or in whole nodes, such as {kind}x16")
        return Topology(name, kind, (1, -(-count // NODE), min(count, NODE)), 1, memory=GPUS[kind], clock=0.0)
    tpu = re.fullmatch(r"(?:(\d+)x)?(v5e|v5litepod|v5p|v6e)-(\d+)", name)
    if not tpu:
        known = ", ".join(f"{kind}-{max(row.shapes)}" for kind, row in GENERATIONS.items())
        raise UserError(
            f"--topology={name} is no machine that is known here: TPU slices up to {known}, several as 2xv5e-256, or GPUs as "
            "h100x8 and h200x8"
        )
    slices, kind, number = int(tpu.group(1) or 1), tpu.group(2).replace("v5litepod", "v5e"), int(tpu.group(3))
    row = GENERATIONS[kind]
    if number not in row.shapes or not 1 <= slices <= 64:
        counted = "TensorCores, two to a chip" if row.counts_cores else "chips"
        sizes = ", ".join(map(str, row.shapes))
        raise UserError(f"--topology={name}: {kind} slices have {sizes} {counted}, and at most 64 of them are joined")
    return Topology(name, kind, row.shapes[number], slices, memory=row.memory, clock=row.clock)
