"""Flags and dispatch: `python -m dip_jax COMMAND [flags]`."""

import importlib
import os
import sys

from absl import flags, logging

from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.runtime import command_line, compilation

COMMANDS = {
    "train": "train a model, or go on where it stopped",
    "status": "what a run is doing, and where its hours went",
    "sample": "draw images from a checkpoint",
    "evaluate": "judge samples: FID, sFID, IS, precision, recall",
    "prepare": "turn images into a dataset directory",
    "convert": "load published PyTorch weights, and write them",
    "sweep": "find the guidance, interval, steps and average to publish with",
    "info": "parameters, FLOPs and memory of a config, before paying for it",
}
USAGE = "usage: python -m dip_jax COMMAND [--help] [flags]\n\n" + "\n".join(f"  {c:<10}{text}" for c, text in COMMANDS.items())


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; a user's mistake is one line on stderr, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if command in ("--help", "-h", "help"):
        print(USAGE)
        return Exit.DONE
    if command not in COMMANDS:
        print(f"dip_jax: unknown command {command!r}: it is one of {', '.join(COMMANDS)}", file=sys.stderr)
        return Exit.USER_ERROR
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's global flags
    logging.set_verbosity(logging.ERROR)  # what a user must know we say ourselves, in one line
    compilation.keep()
    try:
        _run(command, argv[1:])
    except Interrupted as stop:
        print(f"dip_jax {command}: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:  # where a job has nothing to add: before its work, or after
        print(f"dip_jax {command}: stopped", file=sys.stderr)
        return Exit.INTERRUPTED
    except UserError as mistake:
        print(f"dip_jax {command}: {mistake}", file=sys.stderr)
        return Exit.USER_ERROR
    except (RuntimeError, AssertionError):  # how JAX reports a platform that is not there, wherever it is first needed
        if _has_devices():
            raise
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} asks for an accelerator that is not there"
        print(f"dip_jax {command}: {asked}: install the extra for it (cuda or tpu), or set JAX_PLATFORMS=cpu", file=sys.stderr)
        return Exit.USER_ERROR
    return Exit.DONE


def _has_devices() -> bool:
    try:
        return bool(importlib.import_module("jax").devices())
    except (RuntimeError, AssertionError):
        return False


def _run(command: str, argv: list[str]) -> None:
    job = importlib.import_module(f"dip_jax.jobs.{command}")
    values = flags.FlagValues()
    job.define_flags(values)
    if {"--help", "-h", "-help"} & set(argv):
        print(command_line.help_text(command, job, values))
        return
    command_line.parse(values, command, argv)
    job.run(values)


if __name__ == "__main__":
    sys.exit(main())
