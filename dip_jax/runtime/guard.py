"""What stands between a run and the outside world: one run per workdir, signals, a watchdog, disk space, atomic files."""

import contextlib
import datetime
import faulthandler
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from dip_jax.errors import Exit, UserError

_held: set[str] = set()  # lock files of this process: POSIX locks do not exclude their own process


def is_local(path: epath.PathLike) -> bool:
    """True where the path lies on a file system that renames atomically; False for a bucket (gs://, s3://)."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path with ~ expanded and independent of the current directory; bucket addresses as they are."""
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a whole file or nothing: a reader never sees half of it, also after a kill.

    On a local disk by writing beside it, syncing and renaming; in a bucket a single upload is already all or nothing.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def require_writable(workdir: epath.Path) -> None:
    """Creates the directory and proves that a file can be written there.

    Raises:
        UserError: if not.
    """
    probe = workdir / f".writable-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror or error}): choose another or free it"
        ) from error


def require_space(path: epath.Path, needed: int) -> None:
    """Checks that the disk holding `path` has `needed` bytes free. Buckets have no end.

    Raises:
        UserError: with both numbers in GiB.
    """
    if not is_local(path):
        return
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"{path} has {free / 2**30:.2f} GiB free but needs {needed / 2**30:.2f} GiB: free some space, "
            "then run the same command again"
        )


class Lock:
    """One run per workdir, held from `acquire` to `release` or to the end of the process, however it ends.

    On a disk the kernel drops the lock with its process, so a killed run leaves none behind; child processes do not hold it.
    A bucket has no locks: there the holder renews the file, and one that nobody renews is free. The file names the holder.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / "lock"
        self._descriptor: int | None = None
        self._lease: _Lease | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            UserError: if another run has it, naming its host, process and start.
        """
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "command": sys.argv[:3]})
        if not is_local(self._path):
            self._lease = _Lease(self._path, holder)
            return
        name = os.path.realpath(self._path)
        if name in _held:
            raise UserError(f"{self._path.parent} is already in use by this process")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Record locks rather than flock: data workers must not keep a dead trainer's lock alive.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = os.read(descriptor, 4096).decode(errors="replace")
            os.close(descriptor)
            raise UserError(f"{self._path.parent} is in use by {_describe(text)}: stop it or choose another workdir") from error
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        _held.add(name)
        self._descriptor = descriptor

    def release(self) -> None:
        """Gives the lock back; does nothing where it is not held."""
        if self._lease is not None:
            self._lease.end()
            self._lease = None
        if self._descriptor is not None:
            _held.discard(os.path.realpath(self._path))
            os.truncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


class _Lease:
    """A lock file in a bucket, renewed by a thread while the process lives. No clocks of two hosts are compared.

    Raises:
        UserError: if the file changes while we watch it: somebody renews it.
    """

    RENEW = 15.0  # seconds
    FREE = 45.0  # unchanged for so long: the holder is dead

    def __init__(self, path: epath.Path, holder: str):
        self._path, self._holder = path, holder
        if found := self._read():
            end = time.monotonic() + self.FREE
            while time.monotonic() < end:
                time.sleep(self.RENEW / 15)
                if (now := self._read()) != found and now:
                    raise UserError(f"{path.parent} is in use by {_describe(now)}: stop it or choose another workdir")
        self._renew()
        time.sleep(self.RENEW / 5)  # of two that start together, the one that wrote last stays
        if json.loads(self._read() or holder) | {"renewed": 0} != json.loads(holder) | {"renewed": 0}:
            raise UserError(f"{path.parent} is in use by {_describe(self._read())}: stop it or choose another workdir")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _read(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    def _renew(self) -> None:
        self._path.write_text(json.dumps(json.loads(self._holder) | {"renewed": time.time()}))

    def _keep(self) -> None:
        while not self._ended.wait(self.RENEW):
            with contextlib.suppress(OSError):  # the store is away for a moment: the next renewal will do
                self._renew()

    def end(self) -> None:
        """Stops renewing and frees the lock at once."""
        self._ended.set()
        self._thread.join()
        self._path.unlink()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"


class Signals:
    """Turns signals into a request that the loop reads between two steps.

    SIGTERM and SIGUSR1 (a scheduler's warning) ask for `Exit.PREEMPTED`, Ctrl-C for `Exit.INTERRUPTED`. A second Ctrl-C ends
    the process at once, which is safe: a checkpoint exists whole or not at all.

    Args:
        shared: for a run of several processes. SIGTERM is left to JAX's preemption service, which tells the other processes
            (see `distributed.preempted`), and the other two signals are passed on to it.

    Example:
        >>> with Signals() as signals:
        ...     while signals.requested is None: step()
    """

    def __init__(self, *, shared: bool = False):
        self.requested: Exit | None = None
        self._shared = shared
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGUSR1, signal.SIGINT, *(() if self._shared else (signal.SIGTERM,))):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.requested is not None:
            os.write(2, b"\nstopped at once; the last complete checkpoint stays\n")
            os._exit(Exit.INTERRUPTED)
        self.requested = Exit.INTERRUPTED if number == signal.SIGINT else Exit.PREEMPTED
        again = " (again to stop at once)" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving, then stopping{again}\n".encode())
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end the process with `Exit.PREEMPTED`, for jobs that keep what is finished as they go.

    A thread hears them, also while Python waits in a collective. To be entered after `distributed.start`, whose preemption
    service would take SIGTERM for itself.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while (number := os.read(reader, 1)[0]) != 0:
            if number in (signal.SIGTERM, signal.SIGUSR1):
                os.write(2, f"\n{signal.Signals(number).name}: stopped; give the same command again\n".encode())
                os._exit(Exit.PREEMPTED)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


class Watchdog:
    """Ends the process when no step has finished for `seconds`: prints the stack of every thread and exits with code 1.

    The timer lives in a C thread that needs no Python to run, so a process stuck inside a collective ends too, and its peers
    with it. 0 is off.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def beat(self, *, patience: float = 1.0) -> None:
        """Starts the wait anew; `patience` lengthens it for what is known to be slow (compiling, saving, sampling)."""
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds * patience, exit=True, file=sys.__stderr__)

    def stop(self) -> None:
        """No more waiting."""
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()
