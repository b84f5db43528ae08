"""The whole config, and the one bridge from `ConfigDict` to it: no other file reads one."""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dip_jax.config.checkpoint import Checkpoint
from dip_jax.config.data import Data
from dip_jax.config.eval import Eval
from dip_jax.config.flow import Flow
from dip_jax.config.mesh import Mesh
from dip_jax.config.model import Model
from dip_jax.config.optim import Optim
from dip_jax.config.repa import Repa
from dip_jax.config.sample import Sample
from dip_jax.config.train import Train
from dip_jax.errors import UserError


@dataclass(frozen=True)
class Config:
    """All of it. Functions take the section they use, never the whole."""

    model: Model = field(default_factory=Model)
    flow: Flow = field(default_factory=Flow)
    repa: Repa = field(default_factory=Repa)
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    train: Train = field(default_factory=Train)

    def __post_init__(self):
        if self.data.batch_size % self.optim.accumulate:
            raise UserError(
                f"data.batch_size={self.data.batch_size} is not divisible by optim.accumulate={self.optim.accumulate}"
            )
        if self.flow.frequency_weight and any(side % 8 for side in self.model.image_size):
            raise UserError(
                f"flow.frequency_weight={self.flow.frequency_weight} transforms blocks of 8x8 pixels, which "
                f"model.image_size={self.model.image_size} is no multiple of: set it to 0"
            )
        if not self.model.internal and (self.train.only == "internal" or self.sample.internal_guidance != 1):
            raise UserError(
                f"train.only={self.train.only} and sample.internal_guidance={self.sample.internal_guidance} need the second "
                "output: set model.internal=True, or train.only=all and sample.internal_guidance=1"
            )
        if self.train.only == "internal" and self.repa.weight:
            raise UserError("train.only=internal trains no tokens to align: set repa.weight=0")
        judged, saved = self.train.eval_every, self.checkpoint.every_steps
        if self.checkpoint.keep_best and (not judged or judged % saved):
            raise UserError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs train.eval_every={judged} to be a multiple of "
                f"checkpoint.every_steps={saved}: a step can only be kept if it is both judged and saved"
            )


def sections() -> dict[str, type]:
    """The dataclass of each section, by its key."""
    return {f.name: f.default_factory for f in dataclasses.fields(Config)}


def defaults() -> ConfigDict:
    """All options at their defaults, as the `ConfigDict` that a config file starts from."""
    return ConfigDict(
        {name: ConfigDict({f.name: _default(f) for f in dataclasses.fields(cls)}) for name, cls in sections().items()}
    )


def _default(f: dataclasses.Field) -> Any:
    """A field's default; a typed placeholder where that is None, so that the command line can set it."""
    kinds = [kind for kind in typing.get_args(f.type) if kind is not types.NoneType]
    return placeholder(kinds[0]) if f.default is None else f.default


def from_config_dict(config: ConfigDict) -> Config:
    """Checks a `ConfigDict` and freezes it.

    Raises:
        UserError: for an unknown key (naming the nearest valid one), a value of the wrong type, a value out of range, or
            two values that contradict each other.
    """
    known = sections()
    _known("", config.keys(), known)
    config = _renew(config)
    return Config(**{name: _freeze(name, cls, config.get(name, {})) for name, cls in known.items()})


def _renew(values: Any) -> dict[str, Any]:
    """The sections with the names of today: one average had its decay in `optim.ema_decay`."""
    values = {name: values[name] for name in values}
    optim = values.get("optim")
    if isinstance(optim, ConfigDict | dict) and "ema_decay" in optim:
        decay = _typed("optim.ema_decay", optim["ema_decay"], float)
        values["optim"] = {name: optim[name] for name in optim if name != "ema_decay"} | {"ema_decays": (decay,)}
    return values


def check_key(key: str) -> None:
    """Raises `UserError` where a dotted key such as "optim.learning_rate" names no option, with the nearest that does."""
    section, _, option = key.partition(".")
    known = sections()
    _known("", [section], known)
    _known(f"{section}.", [option], {f.name for f in dataclasses.fields(known[section])})


def _freeze(name: str, cls: type, values: Any) -> Any:
    if not isinstance(values, ConfigDict | dict):
        raise UserError(f"config.{name}={values!r} must be a section with keys, such as config.{name}.{_first_key(cls)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    _known(f"{name}.", values.keys(), fields)
    return cls(**{key: _typed(f"{name}.{key}", value, fields[key].type) for key, value in values.items()})


def _first_key(cls: type) -> str:
    return dataclasses.fields(cls)[0].name


def _known(prefix: str, keys: Any, valid: Any) -> None:
    for key in keys:
        if key not in valid:
            nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown config key {prefix}{key}: did you mean {prefix}{nearest}?")


def _typed(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the annotated type; int widens to float, a list becomes a tuple."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(k for k in kinds if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if isinstance(value, list | tuple) and (items[-1] is Ellipsis or len(items) == len(value)):
            items = items[:1] * len(value) if items[-1] is Ellipsis else items
            return tuple(_typed(key, item, k) for item, k in zip(value, items, strict=True))
        raise UserError(
            f"config key {key}={value!r} must be {'a few' if items[-1] is Ellipsis else len(items)} values in a tuple"
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"config key {key}={value!r} must be {kind.__name__}, not {type(value).__name__}")


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config (or one section) as plain JSON values; `from_dict` undoes it."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Inverse of `to_dict`, with all checks: what a checkpoint's `config` item is read with."""
    return from_config_dict(ConfigDict(values))


def difference(old: Config, new: Config) -> list[str]:
    """The keys in which two configs differ, as lines "optim.learning_rate: 0.0001 -> 0.0003"."""
    lines = []
    for section, before in to_dict(old).items():
        after = to_dict(new)[section]
        lines += [f"{section}.{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]
    return lines
