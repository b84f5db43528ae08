"""Every option of dip_jax, with its default and its meaning: a file per section.

A config file (`configs/*.py`) starts from `defaults()`, changes some fields and returns the `ConfigDict`; the command line
overrides single keys; `from_config_dict` checks everything and returns frozen dataclasses.
"""

from dip_jax.config.bridge import Config, check_key, defaults, difference, from_config_dict, from_dict, sections, to_dict
from dip_jax.config.checkpoint import Checkpoint
from dip_jax.config.data import Data
from dip_jax.config.eval import Eval
from dip_jax.config.flow import Flow
from dip_jax.config.mesh import Mesh
from dip_jax.config.model import SIZES, Model
from dip_jax.config.optim import Optim
from dip_jax.config.repa import Repa
from dip_jax.config.sample import Sample
from dip_jax.config.train import Train

__all__ = [
    "SIZES",
    "Checkpoint",
    "Config",
    "Data",
    "Eval",
    "Flow",
    "Mesh",
    "Model",
    "Optim",
    "Repa",
    "Sample",
    "Train",
    "check_key",
    "defaults",
    "difference",
    "from_config_dict",
    "from_dict",
    "sections",
    "to_dict",
]
