"""What the README and docs/ promise: every command is run or marked, every link leads somewhere, every snippet works."""

import importlib
import pathlib
import re
import shlex

import numpy as np
import pytest
import small_data
from absl import flags
from PIL import Image
from places import ROOT
from published import tensors, write

from dip_jax import __main__, config
from dip_jax.runtime import command_line

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
MARK = re.compile(r"(run by|needs hardware): \S.*")


def blocks(page: pathlib.Path, language: str) -> list[tuple[str, str]]:
    """(the comment before it, the text) of every fenced block of a language."""
    found = BLOCK.findall(page.read_text())
    return [(mark, text) for mark, kind, text in found if kind == language]


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, as words: continued lines and quotes joined, comments dropped."""
    found, line = [], ""
    for part in text.replace("\\\n", " ").splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quote that the next line closes
            continue
        found += [words] if words else []
        line = ""
    assert not line, f"a quote is never closed: {line}"
    return found


def section(page: pathlib.Path, title: str) -> str:
    """The text under a heading."""
    return page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_shell_block_of_the_readme_is_run_or_marked():
    found = blocks(ROOT / "README.md", "bash")
    assert len(found) > 5
    for mark, text in found:
        assert MARK.fullmatch(mark), f"say above this block what runs it or what it needs:\n{text}"
        for test in re.findall(r"tests/[\w/]+\.py", mark):
            assert (ROOT / test).exists(), f"{test} does not exist"


OWN = ("dip_jax", "launch/local.sh", "launch/slurm.sbatch", "launch/tpu_pod.sh")


def own_commands() -> list[tuple[str, tuple[str, ...]]]:
    """(page, COMMAND and its flags) of every call of ours in a shell block, also through a launcher."""
    found = []
    for page in PAGES:
        for _, text in blocks(page, "bash"):
            for words in commands(text):
                if set(OWN) & set(words):
                    start = min(i for i, word in enumerate(words) if word in __main__.COMMANDS)
                    found.append((page.name, tuple(words[start:])))
    return found


def test_there_are_commands_to_check():
    assert {words[0] for _, words in own_commands()} == set(__main__.COMMANDS)


@pytest.mark.parametrize(("page", "words"), own_commands(), ids=lambda value: " ".join(value)[:60])
def test_the_flags_of_every_command_exist(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *rest = words
    job = __import__(f"dip_jax.jobs.{command}", fromlist=[command])
    values = flags.FlagValues()
    job.define_flags(values)
    command_line.parse(values, command, rest)  # raises UserError for an unknown flag, key or config file
    if "config" in values and values["config"].value is not None:
        command_line.read_config(values)


def anchors(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), f"{page.name}: {target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_fields_that_a_page_names_exist(page):
    sections = {field: set(cls.__dataclass_fields__) for field, cls in config.sections().items()}
    for name in re.findall(r"`((?:tests|configs|launch|benchmarks|docs|notebooks)/[\w./]+\.\w+)", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name} does not exist"
    for field, key in re.findall(rf"`({'|'.join(sections)})\.(\w+)", page.read_text()):
        known = key in sections[field] or key in ("json", "jsonl", "csv", "py") or is_function(field, key)
        assert known, f"{page.name}: {field}.{key} is no option and no function"


def is_function(module: str, name: str) -> bool:
    """Whether a module of the package by this name (not of its config) has that function."""
    files = [path.relative_to(ROOT) for path in (ROOT / "dip_jax").rglob(f"{module}.py") if path.parent.name != "config"]
    return any(hasattr(importlib.import_module(".".join(file.with_suffix("").parts)), name) for file in files)


TINY = {
    "model.image_size": "(32,32)",
    "model.depth": 1,
    "model.width": 16,
    "model.num_heads": 2,
    "model.head_width": 4,
    "model.inject_after": 1,
    "model.dtype": "float32",
    "data.batch_size": 8,
    "data.num_threads": 1,
    "train.steps": 2,
    "sample.batch_size": 8,
}
SMALLER = {
    "prepare": ["--image_size=32"],
    "train": [f"--config.{key}={value}" for key, value in TINY.items()],
    "sample": ["--steps=2", "--num_samples=10"],
    "sweep": ["--guidance=2", "--steps=1", "--num_samples=10", "--confirm_samples=10", "--confirm_seeds=1"],
    "info": ["--config.model.depth=1", "--config.repa.layer=1"],
}


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """One after the other, as they stand, at small sizes, on a folder of images of one's own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        folder = tmp_path / "IMAGES" / f"class_{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small_data.pixels_of(i, 40)).save(folder / f"{i}.png")
    write(tmp_path / "FILE.safetensors", tensors("dip"))
    (tmp_path / "FILE.safetensors").rename(tmp_path / "FILE")
    (block,) = (text for _, text in blocks(ROOT / "README.md", "bash") if "--from=IMAGES" in text)
    for words in commands(block):
        assert words[:3] == ["python", "-m", "dip_jax"]
        argv = [*words[3:], *SMALLER.get(words[3], [])]
        assert __main__.main(argv) == 0, f"{' '.join(argv)}\n{capsys.readouterr().err}"
    for made in (
        "grid.png",
        "samples.npz",
        "metrics.json",
        "runs/mine/sweep/confirm.csv",
        "runs/mine/checkpoints/2",
        "runs/official/checkpoints/0",
        "dip.pth",
    ):
        assert (tmp_path / made).exists()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (tmp_path / "released").symlink_to(ROOT / "released")
    small_data.write_dataset(tmp_path / "datasets" / "photo_crops", 4)
    monkeypatch.chdir(tmp_path)
    (snippet,) = (text for _, text in blocks(ROOT / "README.md", "python") if "import dip_jax" in text)
    names: dict = {}
    exec(snippet, names)
    assert names["images"].shape == (2, 64, 64, 3) and names["images"].dtype == np.uint8
    assert names["dataset"][1]["label"] == 1


def test_sections_that_a_reader_looks_for():
    for title in ("Two commands", "Results", "Beside its peers", "Extending it", "Code map", "Ten mistakes people make"):
        assert section(ROOT / "README.md", title).strip()
    rows = [line for line in section(ROOT / "README.md", "Ten mistakes people make").splitlines() if line.startswith("| ")]
    assert len(rows) == 11  # the head and ten
