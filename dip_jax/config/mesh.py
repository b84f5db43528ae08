"""How the devices are arranged."""

from dataclasses import dataclass

from dip_jax.config.checks import one_of
from dip_jax.errors import UserError


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
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor")}
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise UserError(f"mesh.{axis}={size} must be a number of devices from 1, or -1 for what the other axes leave")
        if len(rest := [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]) > 1:
            raise UserError(f"{' and '.join(rest)} are -1: only one can be what the others leave, so give the other a number")
        for name, target in self.rules:
            if target is not None:
                one_of(f"mesh.rules {name}", target, ("data", "fsdp", "tensor"))
