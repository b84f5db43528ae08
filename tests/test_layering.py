"""Arrows run one way: every file stands on a floor and imports only from lower ones; some libraries have one door each."""

import ast
import gc
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dip_jax"

FLOORS = {
    "errors": 0,
    "typing": 0,
    "config": 0.5,  # reads errors
    "command_line": 1,
    "flow": 1,
    "sharding": 1,
    "optim": 1,
    "distributed": 1,
    "guard": 0.8,  # writers and steps read it
    "writers": 1,
    "steps": 1.1,  # reads the table of metrics
    "bad_numbers": 1,
    "foreign": 0.5,  # steps reads it
    "misfit": 1,
    "quiet": 1,
    "hlo": 1,
    "hardware": 1.5,  # reads hlo
    "config_change": 1,
    "torch_file": 1,
    "models.patches": 2,
    "models.layers": 2,
    "models.folding": 2,
    "state": 2,
    "sampler": 2,
    "models.condition": 2.5,
    "models.backbone": 3,
    "models.detailers": 3,
    "step": 3,
    "models.placement": 4,
    "cost": 4,
    "models.dip": 5,
    "checkpoint": 6,
    "drawing": 6,
    "plan": 6,
    "sample_files": 6,
    "figures": 7,
    "report": 7.5,
    "jobs.sample": 8,
    "jobs.prepare": 8,
    "jobs.convert": 8,
    "jobs.info": 8,
    "candidates": 8.5,  # interleaves labels as sampling does
    "jobs.evaluate": 9,
    "training": 9.5,
    "jobs.train": 10,
    "__main__": 11,
    "__init__": 11,
}
FOLDERS = {"data": (2, 3), "metrics": (2, 3)}  # files of these may import each other in one order, tested by importing them

ONE_DOOR = {  # third-party module -> the only places that may import it
    "flax.linen": ("models.",),
    "orbax": ("checkpoint",),
    "tensorboardX": ("writers", "metrics."),
    "matplotlib": ("figures",),
    "grain": ("data.",),
    "tensorflow_datasets": ("data.",),
    "array_record": ("data.", "jobs.prepare"),
    "tensorflow": (),
    "torch": (),
    "pickle": ("torch_file",),
}


def modules() -> dict[str, pathlib.Path]:
    files = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts): path for name, path in files.items() if name.name != "__init__" or len(name.parts) == 1}


def imports(path: pathlib.Path) -> set[str]:
    """Every module that the file imports, anywhere in it; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parse(text: str) -> ast.Module:
    """`ast.parse`, which Python 3.11 breaks off where the collector lets another object's end parse something meanwhile."""
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        gc.enable()


def test_files_are_parsed_whatever_the_collector_finds():
    class Parsing:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            ast.parse("1")  # at another depth of the stack than the one that it interrupts

    threshold = gc.get_threshold()
    gc.set_threshold(50)
    try:
        for path in modules().values():
            Parsing()
            parse(path.read_text())
    finally:
        gc.set_threshold(*threshold)
        gc.collect()  # none is left to disturb somebody else's parsing


def floor(name: str) -> float:
    folder = name.split(".")[0]
    if name not in FLOORS and folder in FOLDERS:
        return FOLDERS[folder][1]
    assert name in FLOORS, f"dip_jax/{name.replace('.', '/')}.py stands on no floor: give it one in {__file__}"
    return FLOORS[name]


@pytest.mark.parametrize("name", modules())
def test_imports_come_from_lower_floors(name):
    known = modules()
    for imported in imports(modules()[name]):
        target = imported.removeprefix("dip_jax.")
        if not imported.startswith("dip_jax.") or target not in known:
            continue
        same_folder = name.split(".")[0] in FOLDERS and name.split(".")[0] == target.split(".")[0]
        assert same_folder or floor(target) < floor(name), (
            f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        )


@pytest.mark.parametrize("library", ONE_DOOR)
def test_libraries_have_one_door(library):
    for name, path in modules().items():
        used = any(imported == library or imported.startswith(library + ".") for imported in imports(path))
        assert not used or name.startswith(ONE_DOOR[library]), f"{name} imports {library}: only {ONE_DOOR[library]} may"


def test_no_heap_modules():
    assert not {"utils", "common", "helpers", "misc"} & {part for name in modules() for part in name.split(".")}
