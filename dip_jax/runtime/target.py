"""Which platform a program is traced for: that of the devices in the mesh, never that of the machine that traces it.

A program traced on a laptop for a pod's mesh is then the pod's. Where a program differs by platform, it asks here:
`models/folding.py` (groups of patches, transposed convolutions), `models/layers.py` (attention), `models/linear.py` (parts of
fused products, sums of halves), `training/step.py` (whether a branch refuses an update), `training/state.py` (how kernels
lie in memory, how fast first weights are compiled) and `checkpoints/checkpoint.py` (the latter).
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

_everywhere: contextvars.ContextVar[bool] = contextvars.ContextVar("everywhere", default=False)


def platform() -> str:
    """cpu, gpu or tpu, as the mesh of `jax.set_mesh` has it; empty without a mesh and inside `everywhere`: suit them all."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None or _everywhere.get() else device.platform


# A TPU core's own memory in KiB (`vmem_capacity_bytes` in jax/_src/pallas/mosaic/tpu_info.py), by JAX's name of the device.
_VECTOR_MEMORY = {"TPU v5": 64 * 1024, "TPU v5p": 64 * 1024, "TPU v5 lite": 128 * 1024, "TPU v6 lite": 128 * 1024}
_LIMIT = "xla_tpu_scoped_vmem_limit_kib"
_LEVEL = "xla_backend_optimization_level"


def compiler_options(kind: str) -> dict[str, str]:
    """What XLA is told for a program on devices of this `device_kind`.

    On TPUs one operation may fill half of a core's own memory; the other half is left for what comes next to be fetched into.
    A limit in LIBTPU_INIT_ARGS stands.
    """
    memory = _VECTOR_MEMORY.get(kind)
    if memory is None or _LIMIT in os.environ.get("LIBTPU_INIT_ARGS", ""):
        return {}
    return {_LIMIT: str(memory // 2)}


def once_options(platform: str) -> dict[str, int]:
    """What XLA is told for a program that runs once on `platform`, such as that of the first weights: on a CPU, to be quick.

    A U-Net's weights by seed compile in 7 instead of 18 seconds at LLVM's first level of optimisation, to the same bits
    (tests/runtime/test_target.py). A level in XLA_FLAGS stands.
    """
    return {_LEVEL: 1} if platform == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", "") else {}


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """What is traced inside is no platform's own program: a plan on CPU devices stands for an accelerator's."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)
