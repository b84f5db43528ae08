"""Lock, signals, watchdog, disk space: each in a process of its own where the process is what is at stake."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from dip_jax.__main__ import main
from dip_jax.errors import Exit, UserError
from dip_jax.jobs import info
from dip_jax.runtime import storage
from dip_jax.runtime.lock import Lock
from dip_jax.runtime.signals import Signals


@pytest.fixture
def child():
    """Starts Python code in a process of its own; it does not outlive the test."""
    processes = []

    def start(code: str) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(code)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


HOLD = """
    import os, time
    from etils import epath
    from dip_jax.runtime.lock import Lock
    Lock(epath.Path({path!r})).acquire()
    if {fork} and os.fork() == 0:
        time.sleep(1)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_run_is_refused_by_name_until_the_holder_is_killed(tmp_path, child):
    holder = child(HOLD.format(path=str(tmp_path), fork=False))
    assert holder.stdout.readline() == "held\n"
    lock = Lock(epath.Path(tmp_path))
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on .* since 20"):
        lock.acquire()
    holder.kill()
    holder.communicate()
    lock.acquire()
    with pytest.raises(UserError, match="already in use by this process"):
        Lock(epath.Path(tmp_path)).acquire()
    lock.release()
    Lock(epath.Path(tmp_path)).acquire()


def test_lock_is_not_kept_alive_by_children_of_a_dead_holder(tmp_path, child):
    holder = child(HOLD.format(path=str(tmp_path), fork=True))
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    Lock(epath.Path(tmp_path)).acquire()


def test_a_lock_whose_file_a_failed_start_takes_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, real = tmp_path / "run" / "lock", fcntl.lockf

    def lockf(descriptor, operation):
        real(descriptor, operation)
        monkeypatch.setattr(fcntl, "lockf", real)
        shutil.rmtree(path.parent)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    path.parent.mkdir()
    lock = Lock(epath.Path(path.parent))
    lock.acquire()
    assert str(os.getpid()) in path.read_text()
    lock.release()


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, Exit.PREEMPTED), (signal.SIGUSR1, Exit.PREEMPTED), (signal.SIGINT, Exit.INTERRUPTED)],
)
def test_signals_become_requests_and_handlers_come_back(number, code, capfd):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        assert signals.requested == code
    assert signal.getsignal(number) == before
    assert signal.Signals(number).name in capfd.readouterr().err


def test_second_interrupt_ends_at_once(child):
    process = child("""
        import time
        from dip_jax.runtime.signals import Signals
        with Signals() as signals:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
                if signals.requested: print("asked", flush=True); time.sleep(60)
    """)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == Exit.INTERRUPTED
    assert "Traceback" not in errors


def test_ctrl_c_that_a_job_does_not_answer_is_one_line(monkeypatch, capsys):
    def run(_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(info, "run", run)
    assert main(["info"]) == Exit.INTERRUPTED
    assert capsys.readouterr().err == "dip_jax info: stopped\n"


def test_watchdog_names_the_stuck_line_and_ends_the_process(child):
    process = child("""
        import time
        from dip_jax.runtime.watchdog import Watchdog
        watchdog = Watchdog(0.3)
        def stuck():
            time.sleep(60)
        for _ in range(5):
            watchdog.beat(); time.sleep(0.1)
        watchdog.beat(patience=2); time.sleep(0.4)
        print("alive", flush=True)
        watchdog.beat(); stuck()
    """)
    output, errors = process.communicate(timeout=30)
    assert (output, process.returncode) == ("alive\n", Exit.CRASH)
    assert "in stuck" in errors


def test_stopped_watchdog_lets_go(child):
    process = child("""
        import time
        from dip_jax.runtime.watchdog import Watchdog
        watchdog = Watchdog(0.2); watchdog.beat(); watchdog.stop(); time.sleep(0.5)
        Watchdog(0).beat()
    """)
    assert process.wait(30) == 0


def test_space_and_permission_are_one_line_errors(tmp_path):
    folder = epath.Path(tmp_path)
    storage.require_space(folder, 1)
    with pytest.raises(UserError, match=r"GiB free but needs 1048576.00 GiB"):
        storage.require_space(folder, 2**50)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        storage.require_writable(folder / "file" / "below")
    storage.require_writable(folder / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "file")
    storage.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        storage.write_text(path, "new, but the disk is full")
    assert path.read_text() == "old"


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/../x") == epath.Path(tmp_path / "x")
    assert str(storage.absolute("gs://bucket/run")) == "gs://bucket/run"
    assert storage.is_local("/a") and not storage.is_local("gs://a")
