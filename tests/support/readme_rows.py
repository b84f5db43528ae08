"""The rows that README's "Extending it" shows, put into the tables; as a pytest plugin for a whole session."""

import re

from places import ROOT

from dip_jax.models import cost, detailers

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


def pytest_configure() -> None:
    add_head()
