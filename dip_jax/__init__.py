"""DiP: pixel-space image diffusion in JAX. Importing this package touches no device."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "build": "dip_jax.models.dip",
    "load": "dip_jax.checkpoints.checkpoint",
    "sample": "dip_jax.jobs.sample",
    "open_dataset": "dip_jax.data.prepared",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dip_jax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
