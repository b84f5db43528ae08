"""Reading the command line: the --config flag, absl's errors as one clear line, and help that helps."""

import dataclasses
import os
import re
import sys
import textwrap
from typing import Any

from absl import flags
from ml_collections import config_flags

from dip_jax import config
from dip_jax.errors import UserError
from dip_jax.runtime import membership

_PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id", "join_seconds", "heartbeat_seconds", "save_seconds")


def define_config(values: flags.FlagValues) -> None:
    """Adds --config=configs/NAME.py[:ARG], whose keys --config.section.key=value override."""
    config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:ARG]", lock_config=True, flag_values=values)


def define_processes(values: flags.FlagValues) -> None:
    """Adds the flags of runs of several processes, which `parse` puts where `distributed.start` looks."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, for a run of several processes that neither SLURM, Open MPI nor a TPU machine describes; also "
        "JAX_COORDINATOR_ADDRESS in the environment, as for the next five",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "how many processes make the run", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0, flag_values=values)
    usual = membership.Patience()
    for name, seconds, meaning in (
        ("join_seconds", usual.join, "how long a process waits at the start for the others"),
        ("heartbeat_seconds", usual.heartbeat, "how long for a sign of life of another one, before it ends"),
        ("save_seconds", usual.save, "how long a checkpoint may take to be written by all"),
    ):
        flags.DEFINE_integer(name, None, f"{meaning}; {seconds} where not given", lower_bound=1, flag_values=values)


def read_config(values: flags.FlagValues) -> config.Config:
    """The checked config that --config and its overrides describe.

    Raises:
        UserError: if --config is missing, or as `config.from_config_dict`.
    """
    if values.config is None:
        raise UserError("--config is missing: name a file, such as --config=configs/demo.py")
    try:
        values.config.keys()  # a file that did not load raises at the first touch
    except Exception as error:
        raise UserError(f"--config cannot be read: {_reason(error)}") from error
    return config.from_config_dict(values.config)


def parse(values: flags.FlagValues, command: str, argv: list[str]) -> None:
    """Parses `argv` (without the program's name) into `values`, and those of `define_processes` into the environment.

    Raises:
        UserError: for an unknown flag or config key (naming the nearest valid one), a bad value, a config file that is
            missing or does not run, or an argument that is no flag.
    """
    for key in re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), flags=re.MULTILINE):
        config.check_key(key)
    for path in re.findall(r"^--?config[=\n]([^:\n]*)", "\n".join(argv), flags=re.MULTILINE):
        if not os.path.isfile(path):
            raise UserError(f"--config={path}: no such file; configs/demo.py is one that every checkout has")
    sys.argv = [command, *argv]  # config_flags looks for its overrides there
    try:
        rest = values(sys.argv)[1:]
    except flags.Error as error:
        # Of a config file that raises a ValueError, absl hands on the whole traceback as text.
        _, _, trace = str(error).partition("Error whilst parsing config file:")
        line = f"--config cannot be read: {trace.strip().splitlines()[-1]}" if trace else _one_line(error)
        raise UserError(line) from error
    except Exception as error:  # absl loads the config file here where the command line overrides one of its keys
        raise UserError(f"--config cannot be read: {_reason(error)}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    for name in _PROCESS_FLAGS:
        if name in values and values[name].value is not None:
            os.environ[f"JAX_{name.upper()}"] = str(values[name].value)


def refuse(values: flags.FlagValues, *names: str) -> None:
    """Raises `UserError` where one of these flags was given, which nothing would read beside the others."""
    if given := [f"--{name}" for name in names if values[name].present]:
        raise UserError(
            f"{' and '.join(given)} would not be read beside the other flags: leave out what --help says goes with others"
        )


def number(kind: type, flag: str, text: str) -> Any:
    """The text of a flag, or of one of its values, as an int or float.

    Raises:
        UserError: if it is none.
    """
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"--{flag}: {text!r} is not a number") from error


def help_text(command: str, job: Any, values: flags.FlagValues) -> str:
    """What `COMMAND --help` prints: the job's docstring, its flags with defaults, the config's keys where it takes one."""
    lines = [f"usage: python -m dip_jax {command} [flags]", "", job.__doc__.strip(), "", "flags:"]
    for flag in _flags(values):
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        text = textwrap.wrap(f"{flag.help}{default}", width=88)
        lines += [f"  --{flag.name:<20} {text[0]}", *(f"{'':<25}{line}" for line in text[1:])]
    if "config" in values:
        lines += ["", "config keys, overridden by --config.SECTION.KEY=VALUE (meaning: dip_jax/config/SECTION.py):"]
        for section, options in dataclasses.asdict(config.Config()).items():
            keys = ", ".join(f"{key}={value!r}" for key, value in options.items())
            lines += textwrap.wrap(f"{section}: {keys}", width=112, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _flags(values: flags.FlagValues) -> list[flags.Flag]:
    """The flags in the order in which they were defined, those of `define_processes` last."""
    found = [flag for module in values.flags_by_module_dict().values() for flag in module]
    return sorted(found, key=lambda flag: flag.name in _PROCESS_FLAGS)


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {_one_line(error)}"
