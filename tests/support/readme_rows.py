"""The rows that README's "Extending it" speaks of, put into the tables; as a pytest plugin for a whole session."""

import base64
import functools
import json
import os
import pathlib
import re

import source_files
import toy_network
from places import ROOT

from dip_jax.data import sources
from dip_jax.errors import UserError
from dip_jax.metrics import features
from dip_jax.models import cost, detailers, placement

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
SECTION = (ROOT / "README.md").read_text().split("\n## Extending it\n")[1].split("\n## ")[0]


def rows() -> dict[str, tuple[str, str]]:
    """What can be added: (what to write, what picks it up)."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in SECTION.splitlines() if line.startswith("|")]
    return {what.strip(): (write, tests) for what, write, tests in cells[2:]}


def add_head(*, costed: bool = True) -> None:
    """README's own head and its row; with its line of cost or without."""
    head, line = BLOCK.findall(SECTION)
    names = dict(vars(detailers))
    exec(head, names)
    detailers.HEADS["blur"] = names["Blur"]
    if costed:
        exec(line, dict(vars(cost)))


def doubled(model, p, tokens, t_emb, c, along) -> tuple:
    """A placement: the head after the last block, its patches twice as bright."""
    patches, tokens = placement.post_hoc(model, p, tokens, t_emb, c, along)
    return 2 * patches, tokens


@functools.lru_cache(maxsize=1)
def _lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines()


class LinesSplit:
    """A split of JSON lines: the first one the classes, each further one a name, a label and an image."""

    def __init__(self, path: str, start: int, stop: int):
        self.path, self.start, self.stop, self.notes = path, start, stop, []
        self.classes = json.loads(_lines(path)[0])

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> sources.Item:
        name, label, data = json.loads(_lines(self.path)[1 + self.start + i])
        return sources.Item(name, base64.b64decode(data), label)

    def part(self, start: int, stop: int) -> "LinesSplit":
        return LinesSplit(self.path, self.start + start, self.start + stop)

    def listing(self):
        for i in range(len(self)):
            item = self[i]
            yield item.name, str(len(item.data))


def open_lines(argument, root, image_size, scratch) -> dict[str, LinesSplit]:
    """A source of one split."""
    if not os.path.isfile(root):
        raise UserError(f"--from={root} is no file: give FILE.jsonl")
    return {"train": LinesSplit(root, 0, len(_lines(root)) - 1)}


def write_lines(files: source_files.Files, folder: pathlib.Path) -> pathlib.Path:
    """The images of `source_files` for this source."""
    folder.mkdir()
    classes = sorted({label for label, _, _ in files})
    lines = [[name, classes.index(label), base64.b64encode(data).decode()] for label, name, data in files]
    (folder / "images.jsonl").write_text("\n".join(map(json.dumps, [classes, *lines])))
    return folder / "images.jsonl"


def pytest_configure() -> None:
    add_head()
    placement.PLACEMENTS["doubled"] = doubled
    sources.SOURCES["lines"] = sources.Source(open_lines)
    source_files.WRITERS["lines"] = write_lines
    features.NETWORKS["toy"] = lambda weights: toy_network.network()
