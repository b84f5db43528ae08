"""XLA:TPU's own estimate of a program's cycles, by part of the model; loops count as often as they run.

It is the compiler's cost model for one core, without waiting for memory or the network: it ranks variants of one program and
shows waste, and is no measurement. Of a conditional's branches the dearest counts: only one is taken.
"""

import functools
import re
from collections import Counter

from dip_jax.planning import hlo

# Part of the model -> what the names of its operations contain; the first that fits.
PARTS = {
    "head": r"/(inject_)?head\b|/inject\b",
    "blocks": r"/blocks(_after)?(_context)?\b|/while/body",
    "embeddings": r"/(condition|patch_embed|final)\b",
}
CONTROL = ("while", "conditional", "call")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')


def costs(text: str) -> list[tuple[int, int, hlo.Instruction]]:
    """Each operation that has an estimate: cycles of all its runs, how many these are, the operation; the dearest first.

    One that several calls reach has a row for each.
    """
    entry, found = hlo.computations(text)

    @functools.cache
    def of(name: str) -> list[tuple[int, int, hlo.Instruction]]:
        rows = []
        for one in found.get(name, ()):
            inside = [(of(called), times) for called, times in hlo.called_by(one, found)] if one.opcode in CONTROL else []
            if one.opcode == "conditional":
                inside = [max(inside, key=lambda branch: sum(cycles for cycles, _, _ in branch[0]))]
            for part, times in inside:
                rows += [(cycles * times, runs * times, each) for cycles, runs, each in part]
            estimate = _ESTIMATE.search(one.rest)
            if estimate and not inside:
                rows.append((int(estimate.group(1)), 1, one))
        return rows

    return sorted(of(entry), key=lambda row: -row[0])


def by_part(text: str) -> dict[str, int]:
    """ "head, forward" and the like -> cycles per run, the largest first; "again" is what the backward pass recomputes."""
    total: Counter[str] = Counter()
    for cycles, _, one in costs(text):
        total[part_of(hlo.source_of(one))] += cycles
    return dict(total.most_common())


def part_of(source: str) -> str:
    """The part and pass of the model that an operation of this name serves, as in `by_part`."""
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, source)), None)
    if part is None:
        return "update and the rest"
    return f"{part}, {'again' if 'rematted' in source else 'backward' if 'transpose(' in source else 'forward'}"
