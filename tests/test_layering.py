"""Arrows run one way: every file stands on a floor and imports only from lower ones; some libraries have one door each."""

import ast
import gc
import graphlib
import pathlib

import pytest
from places import ROOT

PACKAGE = ROOT / "dip_jax"

# A file imports from lower floors and from its own folder; a new file needs no entry.
FLOORS = {
    "typing": 0,
    "errors": 0,
    "config": 0.5,  # reads errors
    "flow": 1,
    "runtime": 1,
    "models": 2,
    "data": 2,
    "sampling": 3,
    "checkpoints": 3,
    "reporting": 4,
    "metrics": 5,
    "training": 6,
    "planning": 7,
    "jobs": 8,
    "__main__": 9,
    "__init__": 9,
}

ONE_DOOR = {  # third-party module -> the only places that may import it
    "flax.linen": ("models.",),
    "orbax": ("checkpoints.items",),
    "huggingface_hub": ("checkpoints.hub",),
    "wandb": ("runtime.trackers",),
    "mlflow": ("runtime.trackers",),
    "tensorboardX": ("runtime.writers", "metrics."),
    "matplotlib": ("reporting.",),
    "grain": ("data.",),
    "tensorflow_datasets": ("data.",),
    "pyarrow": ("data.sources.parquet",),
    "array_record": ("data.", "jobs.prepare"),
    "tensorflow": (),
    "torch": (),
    "pickle": ("checkpoints.torch_file",),
}


def modules() -> dict[str, pathlib.Path]:
    files = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    named = {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}
    return {name: path for name, path in named.items() if path.stat().st_size}


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
    assert folder in FLOORS, f"dip_jax/{folder} stands on no floor: give it one in {__file__}"
    return FLOORS[folder]


def own_imports(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    known = modules()
    targets = {imported.removeprefix("dip_jax.") for imported in imports(known[name]) if imported.startswith("dip_jax.")}
    return {target for target in targets if target in known}


@pytest.mark.parametrize("name", modules())
def test_imports_come_from_lower_floors(name):
    for target in own_imports(name):
        same_folder = name.split(".")[0] == target.split(".")[0]
        assert same_folder or floor(target) < floor(name), (
            f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        )


def test_files_of_a_folder_import_each_other_in_one_order():
    graph = {name: {other for other in own_imports(name) if other.split(".")[0] == name.split(".")[0]} for name in modules()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the files' names


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("jobs.")])
def test_a_command_imports_no_other_command(name):
    assert not {target for target in own_imports(name) if target.startswith("jobs.")}


def test_the_root_shows_concepts():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 8


@pytest.mark.parametrize("name", modules())
def test_files_and_functions_are_short(name):
    text = modules()[name].read_text()
    assert text.count("\n") <= 300, f"{name}: {text.count(chr(10))} lines, at most 300: split it by concepts"
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{name}.{node.name}: {length} lines, at most 80"


@pytest.mark.parametrize("library", ONE_DOOR)
def test_libraries_have_one_door(library):
    for name, path in modules().items():
        used = any(imported == library or imported.startswith(library + ".") for imported in imports(path))
        assert not used or name.startswith(ONE_DOOR[library]), f"{name} imports {library}: only {ONE_DOOR[library]} may"


def test_no_heap_modules():
    assert not {"utils", "common", "helpers", "misc"} & {part for name in modules() for part in name.split(".")}
