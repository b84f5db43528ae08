"""Which platform a program is traced for: that of the devices in the mesh, never that of the machine that traces it.

A program traced on a laptop for a pod's mesh is then the pod's. Where a program differs by platform, it asks here:
`models/folding.py` (groups of patches) and `models/layers.py` (attention).
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_everywhere: contextvars.ContextVar[bool] = contextvars.ContextVar("everywhere", default=False)


def platform() -> str:
    """cpu, gpu or tpu, as the mesh of `jax.set_mesh` has it; empty without a mesh and inside `everywhere`: suit them all."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "" if device is None or _everywhere.get() else device.platform


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """What is traced inside is no platform's own program: a plan on CPU devices stands for an accelerator's."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)
