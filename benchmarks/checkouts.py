"""Other people's code that some benchmarks run beside ours: what is missing is told in one line, before anything is built."""

import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn


def require_packages(*names: str) -> None:
    """Ends the script where a package that it runs is not installed. To be called before they are imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        _end(f"needs {' and '.join(missing)}, which dip_jax itself does not: run it in an environment that has them")


def require(option: str, checkout: pathlib.Path, *, of: str, files: Sequence[str]) -> None:
    """Ends the script where `checkout`, which --`option` named, lacks files of the repository `of`."""
    missing = [file for file in files if not (checkout / file).is_file()]
    if missing:
        found = "has no " + ", ".join(missing) if checkout.is_dir() else "is no folder"
        _end(f"--{option}={checkout} {found}: give a checkout of https://github.com/{of}")


def _end(line: str) -> NoReturn:
    print(f"{pathlib.Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(2)
