"""What `COMMAND --help` says can be typed."""

import importlib
import re
import shlex

import pytest
from absl import flags
from places import ROOT

from dip_jax import __main__
from dip_jax.runtime import command_line


def examples() -> list[str]:
    """Every example of every help, continued lines joined, without the words behind it."""
    texts = [importlib.import_module(f"dip_jax.jobs.{command}").__doc__ for command in __main__.COMMANDS]
    lines = [line for text in texts for line in re.sub(r"\\\n", " ", text).splitlines() if "python -m dip_jax" in line]
    return [re.split(r"   +(?=[a-zA-Z0-9])", line.strip())[0] for line in lines]


def defined(command: str) -> flags.FlagValues:
    values = flags.FlagValues()
    importlib.import_module(f"dip_jax.jobs.{command}").define_flags(values)
    return values


def test_every_command_has_examples():
    assert {shlex.split(line)[3] for line in examples()} == set(__main__.COMMANDS)


@pytest.mark.parametrize("line", examples())
def test_an_example_can_be_typed(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *rest = shlex.split(line)[3:]
    command_line.parse(defined(command), command, rest)  # raises for an unknown flag, key or config file, and for a stray word


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_flags_that_a_help_names_exist(command):
    """Its own, or those of another command whose name stands before them."""
    values = defined(command)
    text = command_line.help_text(command, importlib.import_module(f"dip_jax.jobs.{command}"), values)
    for other, name in re.findall(rf"(?:\b({'|'.join(__main__.COMMANDS)}) )?--(?!config\.)([a-z_]+)", text):
        known = {*values, *(defined(other) if other else ())}
        assert {name, name.removeprefix("no")} & known, f"{command} --help names --{name}"
