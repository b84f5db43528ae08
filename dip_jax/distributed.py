"""Several processes as one run: joining, agreeing on a number, noticing a preemption together.

The environment says who is who: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID. Without the first, a
process trains alone.
"""

import os
import sys
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dip_jax.errors import UserError

T = TypeVar("T")
TIMEOUT_SECONDS = 60  # to find the coordinator; JAX alone waits five minutes
HEARTBEAT_SECONDS = 30  # without a sign of life of a peer, a process ends, so that the launcher can restart all
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Joins the other processes where the environment names a coordinator; does nothing for a single process.

    Must run before anything touches a device.

    Raises:
        UserError: if the variables are incomplete or the coordinator does not answer within a minute, with its address.
    """
    values = {name: os.environ.get(name) for name in _VARIABLES}
    if not values["JAX_COORDINATOR_ADDRESS"] or jax.distributed.is_initialized():
        return
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise UserError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is not: set all three, or none")
    address, count, index = values.values()
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"JAX_PROCESS_ID={index} must be a number from 0 to JAX_NUM_PROCESSES={count} - 1")
    try:
        jax.distributed.initialize(
            address,
            int(count),
            int(index),
            initialization_timeout=TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"process {index} of {count} cannot join the run at {address}: {reason}") from error


def is_main() -> bool:
    """True in the one process that writes files and speaks."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line to stderr, once for all processes."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def agree(value: int) -> int:
    """The main process's value, in every process. All must call it."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def total(value: int) -> int:
    """The sum of all processes' values, in every process. All must call it."""
    return value if jax.process_count() == 1 else int(np.sum(multihost_utils.process_allgather(np.int32(value))))


def largest(value: int) -> int:
    """The largest of all processes' values, in every process. All must call it."""
    return value if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))


def require_same(what: str, text: str) -> None:
    """Checks that every process holds the same text, such as its config.

    Raises:
        UserError: in every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    others = [int(index) for index in np.flatnonzero(digests != digests[0])]
    if others:
        raise UserError(f"{what} of process {others} differs from process 0's: start every process with the same command")


def preempted(step: int) -> bool:
    """True at the step at which all processes must save because one was told to stop; the same step in all of them.

    JAX's preemption service hears SIGTERM and settles the step. Call it once per step, in all processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def on_main(action: Callable[[], T]) -> T | None:
    """Runs `action` in the main process only; what it raises as a `UserError` ends all processes. All must call it."""
    result = error = None
    if is_main():
        try:
            result = action()
        except UserError as raised:
            error = raised
    if agree(int(error is not None)):
        raise error or UserError("process 0 stopped with an error: see its log")
    return result
