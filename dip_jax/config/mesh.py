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
        sizes = (self.data, self.fsdp, self.tensor)
        if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh data,fsdp,tensor={sizes} must be positive, with at most one -1 (the rest)")
        for name, target in self.rules:
            if target is not None:
                one_of(f"mesh.rules {name}", target, ("data", "fsdp", "tensor"))
