"""Several processes as one run: joining, agreeing on a number, noticing a preemption together."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dip_jax.errors import Exit, Interrupted, UserError
from dip_jax.runtime import storage
from dip_jax.runtime.membership import FLAGS, Membership, Patience, explain_loopback, find_membership, find_patience

T = TypeVar("T")
_SIGHT = 30.0  # seconds within which a shared file system or a mounted bucket shows a new file
_COLLECTIVE_TIMEOUT = "--xla_cpu_collective_timeout_seconds"


def start(*, computes: bool = True) -> None:
    """Joins the other processes of the run, if there are any, and looks at the devices. Must run before anything touches one.

    A job that computes nothing leaves the accelerator, which another may be using, alone: the processes talk on their CPUs.

    A run that does not come together in time (`membership.Patience`) ends with one line that names the address and
    `Exit.CRASH`: JAX alone would abort.

    Raises:
        UserError: if the environment is incomplete, the processes cannot join, or the accelerator that JAX_PLATFORMS names
            first is not there: JAX itself goes on to the next name, which would train on the CPU without a word.
    """
    if not computes:
        jax.config.update("jax_platforms", "cpu")
    if not jax.distributed.is_initialized():
        _join(on_tpu=computes and _on_tpu_machine())
    if not computes:
        return
    if jax.process_count() != count():
        raise UserError(
            f"JAX sees {jax.process_count()} processes, but this one did not join them: say who is who with {', '.join(FLAGS)}"
        )
    asked, found = os.environ.get("JAX_PLATFORMS", "").split(",")[0], jax.default_backend()
    if asked and {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked) != found:
        raise UserError(
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} asks for an accelerator that is not there: install the extra for it "
            "(cuda or tpu) and check its driver, or set JAX_PLATFORMS=cpu"
        )


def _join(*, on_tpu: bool) -> None:
    member, patience = find_membership(os.environ), find_patience(os.environ)
    if member is None and not on_tpu:
        return
    if _COLLECTIVE_TIMEOUT not in os.environ.get("XLAFLAGS", ""):  # half an hour would be too short for who waits for others
        os.environ["XLAFLAGS"] = f"{os.environ.get('XLAFLAGS', '')} {_COLLECTIVE_TIMEOUT}={30 * 24 * 3600}".strip()
    options: dict[str, Any] = {"initialization_timeout": 2 * patience.join, "heartbeat_timeout_seconds": patience.heartbeat}
    options["shutdown_timeout_seconds"] = max(300, patience.save)  # who is done waits for who still writes
    if member:
        options |= {"coordinator_address": member.address, "num_processes": member.count, "process_id": member.index}
        options |= {"local_device_ids": member.devices, "cluster_detection_method": "deactivate"}
    try:
        with _deadline(patience.join, _nobody_came(member, patience)):
            jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        if member is None:  # no pod: one TPU machine
            return
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {member.index} of {member.count} cannot join the run at {member.address}: {reason}"
        ) from error
    agree(0)  # on CPUs the first exchange waits for 30 s only, later ones as long as _COLLECTIVE_TIMEOUT says


def _nobody_came(member: Membership | None, patience: Patience) -> str:
    who, where, cause = "", "", ""
    if member:
        who, where = f"process {member.index} of {member.count} ", f" at {member.address}"
        cause = explain_loopback(member)
    return (
        f"{who}waited {patience.join} s for the others{where}: is every process started, and is that address process 0's? "
        f"--join_seconds={3 * patience.join} waits longer{cause}"
    )


def _on_tpu_machine() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0]
    return wanted == "tpu" and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def _deadline(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with a message where the block takes longer; C++ code cannot be interrupted."""

    def end() -> None:
        os.write(2, f"dip_jax: {message}\n".encode())
        os._exit(Exit.CRASH)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def count() -> int:
    """How many processes make the run. A process that works alone touches no device for that."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """True in the one process that writes files and speaks."""
    return index() == 0


def say(line: str) -> None:
    """Prints a line to stderr, once for all processes."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def agree(value: int) -> int:
    """The main process's value, in every process. All must call it."""
    return value if count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def total(value: int) -> int:
    """The sum of all processes' values, in every process. All must call it."""
    return value if count() == 1 else int(np.sum(multihost_utils.process_allgather(np.int32(value))))


def largest(value: int) -> int:
    """The largest of all processes' values, in every process. All must call it."""
    return value if count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(value))))


def code_version() -> str:
    """A digest of the package's source files: what two hosts must share to run the same program."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def require_same(facts: Mapping[str, Any]) -> None:
    """Checks that every process holds the same facts, such as its config. All must call it.

    Args:
        facts: JSON values, nested as they like.

    Raises:
        UserError: in every process, with the first differences from process 0.
    """
    if count() == 1:
        return
    lines = _flatten(facts)
    own = json.dumps(lines).encode()
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(own)))
    others = [int(index) for index in np.flatnonzero(digests != digests[0])]
    if not others:
        return
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    texts = multihost_utils.process_allgather(np.frombuffer(own.ljust(int(sizes.max())), np.uint8))
    first, other = (json.loads(texts[index].tobytes()) for index in (0, others[0]))
    differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    shown = "; ".join(f"{key}: {first.get(key)} in process 0, {other.get(key)} in process {others[0]}" for key in differing[:5])
    raise UserError(f"processes {others} differ from process 0 in {shown}: start every process with the same command")


def require_shared(folder: epath.Path, *, flag: str) -> None:
    """Checks that all see the same folder: process 0 writes a file there that the others must find. All must call it.

    Args:
        folder: exists and can be written, as process 0 sees it.
        flag: that named it, for the message.

    Raises:
        UserError: in every process, where one does not find the file within `_SIGHT` seconds.
    """
    if count() == 1:
        return
    mark = folder / f".shared-{agree(secrets.randbits(31)):08x}"
    on_main(lambda: storage.write_text(mark, ""))
    blind = np.flatnonzero(multihost_utils.process_allgather(np.int32(not _appears(mark)))).tolist()
    if is_main():
        mark.unlink()
    if blind:
        raise UserError(
            f"{flag}={folder} is not one place: processes {blind} do not see what process 0 "
            "writes there; name a directory of a shared file system, or a bucket (gs://...)"
        )


def _appears(path: epath.Path) -> bool:
    end = time.monotonic() + _SIGHT
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _flatten(facts: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}."""
    if not isinstance(facts, Mapping):
        return {prefix: json.dumps(facts)}
    parts = (_flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in facts.items())
    return {key: text for part in parts for key, text in part.items()}


def preempted(step: int) -> bool:
    """True at the step at which all processes must save because one was told to stop; the same step in all of them.

    JAX's preemption service hears SIGTERM and settles the step. Call it once per step, in all processes.
    """
    return count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def on_all(action: Callable[[], T]) -> T:
    """Runs `action` in every process; what it raises for the user in one ends all. All must call it."""
    result = error = None
    try:
        result = action()
    except (UserError, Interrupted) as raised:
        error = raised
    _end_alike(error, largest(_code(error)), "another process")
    return result


def on_main(action: Callable[[], T]) -> T | None:
    """Runs `action` in the main process only; what it raises for the user ends all processes alike. All must call it."""
    result = error = None
    if is_main():
        try:
            result = action()
        except (UserError, Interrupted) as raised:
            error = raised
    _end_alike(error, agree(_code(error)), "process 0")
    return result


def _code(error: UserError | Interrupted | None) -> int:
    return int(getattr(error, "code", Exit.USER_ERROR) if error else Exit.DONE)


def _end_alike(error: UserError | Interrupted | None, code: int, who: str) -> None:
    """Raises this process's own error, or the like of what another one ended with."""
    if code == Exit.USER_ERROR:
        raise error or UserError(f"{who} stopped with an error: see its log")
    if code != Exit.DONE:
        raise error or Interrupted(f"{who} stopped: see its log", code=Exit(code))
