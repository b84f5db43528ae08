"""`launch/slurm.sbatch` on a real SLURM: two virtual nodes on this machine, started and ended by the test."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import launching
import pytest

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
PATIENCE = 300  # seconds without a step or another state
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
KillWait=5
JobRequeue=1
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of two nodes in a folder; use it as a context manager."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._environment = launching.environment(SLURM_CONF=str(folder / "slurm.conf")) | {"PATH": PATH}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        ports = list(self._free_ports(3))
        (self._folder / "state").mkdir()
        (self._folder / "munge.key").write_bytes(os.urandom(128))
        (self._folder / "munge.key").chmod(0o400)
        values = {"host": socket.gethostname().split(".")[0], "folder": self._folder}
        values |= {"port": ports[0], "first": ports[1], "second": ports[2]}
        (self._folder / "slurm.conf").write_text(CONF.format(**values))
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        files |= {"seed-file": "munge.seed"}
        try:
            self._daemon("munged", "--foreground", "--force", *(f"--{k}={self._folder / v}" for k, v in files.items()))
            self._wait(lambda: (self._folder / "munge.socket").exists(), "munged")
            self._daemon("slurmctld", "-D", "-c", "-f", self._folder / "slurm.conf")
            for node in ("n1", "n2"):
                (self._folder / f"spool.{node}").mkdir()
                self._daemon("slurmd", "-D", "-c", "-N", node, "-f", self._folder / "slurm.conf")
            self._wait(lambda: self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * 2, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *argv: object, check: bool = True, **env: str) -> str:
        """A command of SLURM, from the checkout."""
        done = subprocess.run(
            list(map(str, argv)), cwd=launching.ROOT, env=self._environment | env, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def _daemon(self, *argv: object) -> None:
        with open(self._folder / f"{argv[0]}.out", "a") as log:
            self._daemons.append(
                subprocess.Popen(list(map(str, argv)), env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    def _wait(self, condition, what: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            logs = "\n".join(path.read_text()[-2000:] for path in self._folder.glob("*.out"))
            assert time.monotonic() < end, f"{what} did not come up:\n{logs}"
            time.sleep(0.2)

    @staticmethod
    def _free_ports(count: int) -> Iterator[int]:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", 0))
                yield probe.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing or os.geteuid() != 0:
        reason = f"SLURM is not here ({', '.join(missing)}): apt-get install slurm-wlm munge" if missing else "needs root"
        print(f"skipped: {reason}")
        pytest.skip(reason)
    with Slurm(pathlib.Path(tmp_path_factory.mktemp("slurm"))) as cluster:
        yield cluster


@pytest.mark.slow
def test_preempted_by_its_time_limit_it_requeues_itself_and_goes_on(slurm, tmp_path):
    """SLURM looks at time limits every 30 s: the first start, of at least 0.25 s per step, cannot be over by then."""
    steps = 200
    config = launching.write_config(tmp_path, steps=steps)
    train = ("train", f"--config={config}", "--config.checkpoint.every_steps=50")
    out = tmp_path / "job.log"
    job = slurm.run(
        *("sbatch", "--parsable", "--nodes=2", "--time=60", "--signal=TERM@120", "--gpus-per-node=0", f"--output={out}"),
        *("launch/slurm.sbatch", *train, f"--workdir={tmp_path / 'run'}"),
        PYTHON=str(launching.write_slow_python(tmp_path, seconds=0.25)),
        ACCELERATOR="cpu",
    ).strip()
    try:
        seen = _follow(slurm, job, tmp_path / "run" / "metrics.jsonl")
        log = out.read_text()
        assert seen[-1] == "COMPLETED", (seen, log)
        restarts = log.count("ended with 85")
        assert restarts == 1 and log.rstrip().endswith("ended with 0"), log
        for task in (0, 1):
            assert (launching.ROOT / f"logs/slurm-{job}-{task}.log").read_text().count("going on from step") == 1 - task
        again = launching.launch(
            "launch/local.sh", "--processes=2", f"--logs={tmp_path}", *train, f"--workdir={tmp_path / 'undisturbed'}"
        )
        assert again.returncode == 0, again.stderr
        curve = launching.losses(tmp_path / "run")
        assert list(curve) == list(range(1, steps + 1))
        assert curve == launching.losses(tmp_path / "undisturbed")
    finally:
        for file in (launching.ROOT / "logs").glob(f"slurm-{job}*"):
            file.unlink()


def _follow(slurm: Slurm, job: str, table: pathlib.Path) -> list[str]:
    """The states that the job goes through, as long as it makes progress.

    After ten steps its time limit comes down to less than two minutes from now, and the signal, two minutes before, is due at
    once, on a fast machine as on a busy one. A requeued job is started after seconds instead of two minutes, with time enough.
    """
    seen: list[str] = []
    progress, since, shortened = None, time.monotonic(), False
    while time.monotonic() < since + PATIENCE:
        words = slurm.run("scontrol", "-o", "show", "job", job).split()
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        state, rows = facts["JobState"], len(table.read_text().splitlines()) if table.exists() else 0
        if not seen or seen[-1] != state:
            seen.append(state)
        if state in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
            break
        if (state, rows) != progress:
            progress, since = (state, rows), time.monotonic()
        if state == "PENDING" and time.monotonic() > since + 10:  # the nodes must have forgotten its last start
            slurm.run("scontrol", "update", f"job={job}", "TimeLimit=60", "StartTime=now", check=False)
        if not shortened and rows >= 10:
            hours, minutes, _ = map(int, facts["RunTime"].split(":"))
            slurm.run("scontrol", "update", f"job={job}", f"TimeLimit={60 * hours + minutes + 2}")
            shortened = True
        time.sleep(0.5)
    return seen
