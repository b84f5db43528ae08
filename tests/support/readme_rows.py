"""The rows that README's "Extending it" shows, put into the tables; as a pytest plugin for a whole session."""

import re

from places import ROOT

from dip_jax.models import cost, detailers, placement

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def snippets() -> list[str]:
    """The Python blocks of that section."""
    return BLOCK.findall((ROOT / "README.md").read_text().split("\n## Extending it\n")[1].split("\n## ")[0])


def add_head(*, costed: bool = True) -> None:
    """README's head and its row; with its line of cost or without."""
    head, line = snippets()
    names = dict(vars(detailers))
    exec(head, names)
    detailers.HEADS["blur"] = names["Blur"]
    if costed:
        exec(line, dict(vars(cost)))


def doubled(model, p, tokens, t_emb, c, tap) -> tuple:
    """A placement: the head after the last block, its patches twice as bright."""
    patches, tokens = placement.post_hoc(model, p, tokens, t_emb, c, tap)
    return 2 * patches, tokens


def pytest_configure() -> None:
    add_head()
    placement.PLACEMENTS["doubled"] = doubled
