"""Which item of a step holds which average of the weights: `ema` that of the first decay, `ema_1`, `ema_2`, … the others.

A reader of one touches no other: neither reads nor hashes nor fetches it.
"""

from collections.abc import Callable, Sequence

from etils import epath

from dip_jax.checkpoints import directories
from dip_jax.checkpoints.items import read_record
from dip_jax.config.optim import MOST_AVERAGES
from dip_jax.errors import UserError

NAMES = ("ema", *(f"ema_{k}" for k in range(1, MOST_AVERAGES)))
_ARRAYS = ("state", *NAMES)
UNREAD = {  # what a reader of some weights leaves alone
    "initial": _ARRAYS,
    "raw": NAMES,
    **{name: tuple(item for item in _ARRAYS if item != name) for name in NAMES},
}


def name_of(decay: float, decays: Sequence[float]) -> str:
    """The item of the average with this decay.

    Raises:
        UserError: if there is none.
    """
    if decay not in decays:
        there = ", ".join(map(str, decays))
        raise UserError(f"there is no average of decay {decay}: the run kept {there} (optim.ema_decays)")
    return NAMES[tuple(decays).index(decay)]


def find(path: epath.PathLike, decay: float, *, verify: bool = True, report: Callable[[str], None]) -> str:
    """The item of the average with this decay in the newest step of `path`, as `directories.find` takes it.

    Raises:
        UserError: if there is no checkpoint, or none with such an average.
    """
    step = directories.find(path, verify=verify, report=report, unread=_ARRAYS)
    return name_of(decay, read_record(step).config.optim.ema_decays)


def carried_over(old: Sequence[float], new: Sequence[float]) -> list[str] | None:
    """The items from which a run that kept averages of the decays `old` goes on with `new`; None where it cannot.

    An average of the same decay goes on as it is, whichever place it has. With another decay, one average goes on from that in
    its place. One that was not there has forgotten nothing, and cannot begin now.
    """
    if set(new) <= set(old):
        return [name_of(decay, old) for decay in new]
    return list(NAMES[: len(new)]) if len(new) == len(old) == 1 else None
