"""Every option of dip_jax, with its default and its meaning, and the one bridge from `ConfigDict`.

A config file (`configs/*.py`) starts from `defaults()`, changes some fields and returns the `ConfigDict`; the command line
overrides single keys; `from_config_dict` checks everything and returns frozen dataclasses. No other file reads a `ConfigDict`.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dip_jax.errors import UserError

# Backbone sizes: layers, width D, attention heads K (recipe, "Sizes"; tiny is for the demo and the tests).
SIZES = {
    "tiny": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (26, 1152, 16),
}


@dataclass(frozen=True)
class Model:
    """The network (section 3): DiT backbone, Patch Detailer Head, and where the head sits."""

    size: str = "XL"  # row of SIZES; gives depth, width and num_heads where those are not set
    depth: int | None = None  # L
    width: int | None = None  # D
    num_heads: int | None = None  # K
    patch_size: int = 16  # P: 16 at 256x256, 32 at 512x512
    image_size: tuple[int, ...] = (256, 256)  # (H, W); one number means a square
    num_classes: int = 1000  # label `num_classes` is the null (unconditional) class
    head: str = "unet"  # row of models.detailers.HEADS
    placement: str = "post_hoc"  # row of models.placement.PLACEMENTS
    inject_after: int | None = None  # intermediate, hybrid: the head sits after this block; None is half the depth
    head_width: int | None = None  # base channels of the head; None is the head's own default
    head_depth: int | None = None  # stages (U-Net) or blocks (the others); None is the head's own default
    head_pool: str = "avg"  # U-Net: avg | max
    head_upsample: str = "nearest"  # U-Net: nearest | bilinear
    head_init: str = "fan_in"  # how the U-Net's convolutions start: fan_in (variance 1 / (3 fan-in)) | he (2 / fan-in)
    head_zero_init: bool = True  # the head's last layer starts at zero
    head_feature: str = "raw"  # what the U-Net reads of the backbone: raw (s) | silu (SiLU(t_emb + s))
    position: str = "rope"  # how tokens know their place: rope | rope+sincos (DiT's fixed table joins the embedded patches)
    label_std: float = 0.02  # standard deviation at the start of the label table
    prediction: str = "v"  # what the network says: v | x | eps; loss and sampling convert it to the velocity
    t_clip: float = 0.05  # floor of 1 - t (x) and of t (eps) in that conversion
    dtype: str = "bfloat16"  # compute; parameters, norms, softmax, RoPE, t and loss stay float32
    attention: str = "auto"  # auto | xla | cudnn
    scan_layers: bool = True  # one compiled block, scanned; False unrolls
    remat: str = "dots"  # what the backward pass recomputes: none | dots (all but matrix products) | full
    head_remat: bool = True  # recompute the head in the backward pass

    def __post_init__(self):
        _one_of("model.size", self.size, SIZES)
        for name, value in zip(("depth", "width", "num_heads"), SIZES[self.size], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if len(self.image_size) == 1:
            object.__setattr__(self, "image_size", self.image_size * 2)
        if self.inject_after is None:
            object.__setattr__(self, "inject_after", max(self.depth // 2, 1))
        self._check()

    def _check(self):
        for name in ("depth", "width", "num_heads", "patch_size", "num_classes", "head_width", "head_depth"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"model.image_size={self.image_size} must be one or two positive numbers (H, W)")
        for side in self.image_size:
            if side % self.patch_size:
                low = max(side - side % self.patch_size, self.patch_size)
                raise UserError(
                    f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}: "
                    f"the nearest side is {low if side % self.patch_size * 2 < self.patch_size else low + self.patch_size}"
                )
        if self.width % self.num_heads or self.width // self.num_heads % 4:
            raise UserError(
                f"model.width={self.width} over model.num_heads={self.num_heads} must give a head width that is a "
                "multiple of 4 (2-D RoPE rotates pairs along two axes)"
            )
        if not 1 <= self.inject_after <= self.depth:
            raise UserError(f"model.inject_after={self.inject_after} must lie in 1..model.depth={self.depth}")
        _one_of("model.head_pool", self.head_pool, ("avg", "max"))
        _one_of("model.head_upsample", self.head_upsample, ("nearest", "bilinear"))
        _one_of("model.head_init", self.head_init, ("fan_in", "he"))
        _one_of("model.head_feature", self.head_feature, ("raw", "silu"))
        _one_of("model.position", self.position, ("rope", "rope+sincos"))
        _one_of("model.prediction", self.prediction, ("v", "x", "eps"))
        _positive("model", self, "t_clip", "label_std")
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("model.attention", self.attention, ("auto", "xla", "cudnn"))
        _one_of("model.remat", self.remat, ("none", "dots", "full"))


@dataclass(frozen=True)
class Flow:
    """The objective (section 3.1): x_t = t x + (1 - t) eps, regress the velocity x - eps."""

    t_mean: float = 0.0  # t ~ sigmoid(N(t_mean, t_std))
    t_std: float = 1.0
    t_shift: float = 1.0  # then t / (t + (1 - t) t_shift); above 1 favours noise
    label_dropout: float = 0.1  # share of examples whose label becomes the null class

    def __post_init__(self):
        _positive("flow", self, "t_std", "t_shift")
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"flow.label_dropout={self.label_dropout} must lie in [0, 1]")


@dataclass(frozen=True)
class Optim:
    """AdamW and the exponential moving average of the weights (section 4.1)."""

    learning_rate: float = 1e-4
    schedule: str = "constant"  # after the warm-up: constant | cosine (to zero at train.steps)
    warmup_steps: int = 0  # linear from zero
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None  # global norm; None is off
    accumulate: int = 1  # micro-batches per step; the batch is split, the result is the same
    ema_decay: float = 0.9999  # ema <- decay * ema + (1 - decay) * params, every step from step 0
    ema_warmup: bool = False  # decay at step k (from 0) is min(ema_decay, (1 + k) / (10 + k)): for short runs

    def __post_init__(self):
        _one_of("optim.schedule", self.schedule, ("constant", "cosine"))
        _positive("optim", self, "learning_rate", "eps", "accumulate")
        _not_negative("optim", self, "warmup_steps", "weight_decay")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.grad_clip is not None:
            _positive("optim", self, "grad_clip")


@dataclass(frozen=True)
class Data:
    """Where the training images come from and how they are read."""

    path: str = ""  # dataset directory made by `python -m dip_jax prepare`
    source: str = "folder"  # what `prepare` made it from; only used to say how to make it when it is missing
    batch_size: int = 256  # global batch, over all devices and hosts
    flip: bool = False  # mirror each image with probability 1/2
    num_workers: int = 0  # Grain worker processes; 0 reads in threads of this process
    num_threads: int = 16  # reading threads of this process (or of each worker)
    prefetch: int = 2  # batches placed on the devices ahead of the step
    on_bad_record: str = "error"  # error | replace (by a deterministic neighbour, counted)

    def __post_init__(self):
        _positive("data", self, "batch_size", "prefetch", "num_threads")
        _not_negative("data", self, "num_workers")
        _one_of("data.on_bad_record", self.on_bad_record, ("error", "replace"))


@dataclass(frozen=True)
class Mesh:
    """Devices as a grid data x fsdp x tensor; -1 is whatever the other axes leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    zero1: bool = False  # shard optimizer state and EMA over the data axis too
    # Logical axis -> mesh axes, first match wins; () replaces the rules of sharding.RULES by none of your own.
    rules: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh data,fsdp,tensor={sizes} must be positive, with at most one -1 (the rest)")
        for name, target in self.rules:
            if target is not None:
                _one_of(f"mesh.rules {name}", target, ("data", "fsdp", "tensor"))


@dataclass(frozen=True)
class Checkpoint:
    """When to save, what to keep."""

    every_steps: int = 5000
    keep_last: int = 3
    keep_every: int = 0  # steps divisible by this stay for ever; 0 keeps none
    keep_best: str = ""  # fid | sfid | is | precision | recall: the step best by this metric of eval.jsonl stays too
    verify: bool = True  # check the SHA-256 manifest before a restore

    def __post_init__(self):
        _positive("checkpoint", self, "every_steps", "keep_last")
        _not_negative("checkpoint", self, "keep_every")
        if self.keep_best:
            _one_of("checkpoint.keep_best", self.keep_best, ("fid", "sfid", "is", "precision", "recall"))


@dataclass(frozen=True)
class Sample:
    """How images are drawn (section 4.1: Euler, 100 steps, classifier-free guidance on an interval)."""

    solver: str = "euler"  # euler | heun | ab2 | sde
    steps: int = 100
    guidance: float = 4.0  # v = v_u + guidance * (v_c - v_u)
    interval: tuple[float, float] = (0.1, 1.0)  # guidance applies where low < t < high, strictly
    t_shift: float = 1.0  # time grid t / (t + (1 - t) t_shift)
    sde_noise: float = 1.0  # sde: g^2 = 2 sde_noise (1 - t); 0 is the ODE
    batch_size: int = 64  # images per compiled call, over all devices

    def __post_init__(self):
        _one_of("sample.solver", self.solver, ("euler", "heun", "ab2", "sde"))
        _positive("sample", self, "t_shift", "batch_size")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"sample.steps={self.steps} must lie in 1..1000")
        _not_negative("sample", self, "sde_noise")
        if not math.isfinite(self.guidance):
            raise UserError(f"sample.guidance={self.guidance} must be a finite number")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(f"sample.interval={self.interval} must be low,high with 0 <= low <= high <= 1")


@dataclass(frozen=True)
class Eval:
    """What a sample set is judged with."""

    reference: str = ""  # prepared dataset directory, or an .npz of images or of ADM statistics
    features: str = "lite0"  # lite0 | inception; anything but inception carries its name in the metric's name
    weights: str = ""  # file of the inception weights
    num_samples: int = 500
    batch_size: int = 50  # images per feature-network call

    def __post_init__(self):
        _one_of("eval.features", self.features, ("inception", "lite0"))
        _positive("eval", self, "num_samples", "batch_size")


@dataclass(frozen=True)
class Train:
    """The loop: how long, how often it reports, when it gives up."""

    steps: int = 800_729  # 160 epochs of ImageNet at batch 256
    seed: int = 0
    init_from: str = ""  # checkpoint whose backbone a new run starts from (section 3.4); set by --init_from
    log_every: int = 100
    sample_every: int = 5000  # a grid drawn from the EMA; 0 is never
    eval_every: int = 0  # a small FID of the EMA and of the last weights; 0 is never
    bad_steps: int = 10  # non-finite updates in a row that are skipped before `on_bad_steps`
    on_bad_steps: str = "rollback"  # rollback (to the last good checkpoint, other data) | abort
    watchdog_seconds: float = 600.0  # no step for this long: print every thread's stack and abort; 0 is off

    def __post_init__(self):
        _positive("train", self, "steps", "log_every", "bad_steps")
        _not_negative("train", self, "seed", "sample_every", "eval_every", "watchdog_seconds")
        _one_of("train.on_bad_steps", self.on_bad_steps, ("rollback", "abort"))


@dataclass(frozen=True)
class Config:
    """All of it. Functions take the section they use, never the whole."""

    model: Model = field(default_factory=Model)
    flow: Flow = field(default_factory=Flow)
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
        judged, saved = self.train.eval_every, self.checkpoint.every_steps
        if self.checkpoint.keep_best and (not judged or judged % saved):
            raise UserError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs train.eval_every={judged} to be a multiple of "
                f"checkpoint.every_steps={saved}: a step can only be kept if it is both judged and saved"
            )


def _sections() -> dict[str, type]:
    return {f.name: f.default_factory for f in dataclasses.fields(Config)}


def defaults() -> ConfigDict:
    """All options at their defaults, as the `ConfigDict` that a config file starts from."""
    sections = {name: ConfigDict({f.name: _default(f) for f in dataclasses.fields(cls)}) for name, cls in _sections().items()}
    return ConfigDict(sections)


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
    sections = _sections()
    _known("", config.keys(), sections)
    return Config(**{name: _freeze(name, cls, config.get(name, {})) for name, cls in sections.items()})


def check_key(key: str) -> None:
    """Raises `UserError` where a dotted key such as "optim.learning_rate" names no option, with the nearest that does."""
    section, _, option = key.partition(".")
    sections = _sections()
    _known("", [section], sections)
    _known(f"{section}.", [option], {f.name for f in dataclasses.fields(sections[section])})


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


def _one_of(key: str, value: str, valid: Any) -> None:
    if value not in valid:
        nearest = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)[0]
        raise UserError(f"{key}={value!r} is unknown: it is one of {', '.join(valid)}; did you mean {nearest!r}?")


def _positive(section: str, values: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(values, name) < math.inf:
            raise UserError(f"{section}.{name}={getattr(values, name)} must be positive")


def _not_negative(section: str, values: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(values, name) < math.inf:
            raise UserError(f"{section}.{name}={getattr(values, name)} must not be negative")


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
