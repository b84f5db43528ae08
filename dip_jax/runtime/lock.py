"""One run per workdir."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
import threading
import time

from etils import epath

from dip_jax.errors import UserError
from dip_jax.runtime.storage import is_local

_held: set[str] = set()  # lock files of this process: POSIX locks do not exclude their own process


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
        if not os.fstat(descriptor).st_nlink:  # a failed start took the file away meanwhile
            os.close(descriptor)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.acquire()
            return
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
