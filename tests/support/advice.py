"""What the package's messages tell people to type, read from its source."""

import ast
import re
from collections.abc import Iterator

from places import ROOT

# A flag, a command, a package to install, a config key with a value: something to type.
_TYPED = re.compile(r"--[a-z_]+|python -m |pip install|\bset [a-z]+\.[a-z_]+|\b[a-z]+\.[a-z_]+=")


def _text(node: ast.AST) -> str | None:
    """A literal, also of several parts; what is filled in stands as {}."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _passed_over(tree: ast.AST) -> set[int]:
    """Docstrings, and the texts of --help."""
    nodes: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            nodes |= {id(part) for part in ast.walk(node) if isinstance(node.value, ast.Constant)}
        if isinstance(node, ast.Call) and "DEFINE_" in ast.unparse(node.func):
            nodes |= {id(part) for part in ast.walk(node)}
    return nodes


def advice() -> Iterator[tuple[str, str]]:
    """(file, what a message says to do): what follows its last colon or semicolon, where that can be typed."""
    for path in sorted((ROOT / "dip_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        done = _passed_over(tree)
        for node in ast.walk(tree):
            text = None if id(node) in done else _text(node)
            if text is None:
                continue
            done |= {id(part) for part in ast.walk(node)}
            parts = re.split(r": |; ", text)
            if len(parts) > 1 and _TYPED.search(parts[-1]) and "usage" not in text:
                yield path.relative_to(ROOT / "dip_jax").as_posix(), parts[-1].rstrip(".")
