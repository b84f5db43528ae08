"""Which collectives of a compiled, scheduled program are under way while products run.

A collective that is not split into a start and a done stops its device until it is over. What is split hides behind the
products that the schedule puts between the two; TPU programs repeat the collective in the fusions in which that happens.
"""

import re
from collections.abc import Mapping, Sequence

from dip_jax.planning.hlo import COLLECTIVES, Instruction, called_by, channel_of, computations

_PRODUCTS = ("dot", "convolution")
_LIBRARIES = re.compile(r'custom_call_target="(__cublas|__cudnn|cublas|cudnn|triton|__triton)')


def hidden_channels(text: str) -> frozenset[int]:
    """The `Collective.channel` of every collective that products run beside."""
    _, found = computations(text)
    multiplies = _multiplying(found)
    hidden: set[int] = set()
    for name, body in found.items():
        if name in multiplies:  # one fusion that multiplies while it goes on
            hidden |= {channel_of(one) for one in body if one.opcode in COLLECTIVES and name.startswith("async_collective")}
        under_way: dict[int, bool] = {}
        for one in body:
            started, ended = _ends(one, found)
            if ended in under_way and under_way.pop(ended):
                hidden.add(ended)
            if any(called in multiplies for called, _ in called_by(one, found)) or _is_product(one):
                under_way = dict.fromkeys(under_way, True)
            if started:
                under_way[started] = False
    return frozenset(hidden - {0})


def _ends(one: Instruction, found: Mapping[str, Sequence[Instruction]]) -> tuple[int, int]:
    """The channels of the collectives that an instruction starts and finishes; 0 for none."""
    kind = one.opcode.removesuffix("-start").removesuffix("-done")
    if kind in COLLECTIVES and kind != one.opcode:
        channel = channel_of(one)
        if one.opcode.endswith("-start"):
            return channel, 0
        starts = [start for body in found.values() for start in body if start.name == one.operands[0]]
        return 0, channel_of(starts[0]) if starts else 0
    for called, _ in called_by(one, found) if one.opcode == "fusion" else ():
        body = found.get(called, ())
        channels = [channel_of(inner) for inner in body if inner.opcode in COLLECTIVES]
        for inner in body if channels else ():
            if 'custom_call_target="AsyncCollectiveStart"' in inner.rest:
                return channels[0], 0
            if 'custom_call_target="AsyncCollectiveDone"' in inner.rest:
                return 0, channels[0]
    return 0, 0


def _is_product(one: Instruction) -> bool:
    return one.opcode in _PRODUCTS or (one.opcode == "custom-call" and bool(_LIBRARIES.search(one.rest)))


def _multiplying(found: Mapping[str, Sequence[Instruction]]) -> frozenset[str]:
    """The computations in which a product runs, at whatever depth."""
    own = {name for name, body in found.items() if any(map(_is_product, body))}
    calls = {name: {called for one in body for called, _ in called_by(one, found)} for name, body in found.items()}
    while more := {name for name, called in calls.items() if name not in own and called & own}:
        own |= more
    return frozenset(own)
