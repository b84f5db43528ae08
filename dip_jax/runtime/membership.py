"""Who a process is among those of its run.

Who is who is found in this order:
    --coordinator_address=HOST:PORT --num_processes=N --process_id=I   anything else: say it yourself
    SLURM_*                                                            a step of `srun` with several tasks
    OMPI_*                                                             Open MPI's `mpirun`
    a TPU virtual machine                                              asked by JAX itself
A flag sets the environment variable JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID, for a launcher (such as
Kubernetes) or a notebook that would rather set these.
With none of these a process works alone.
How patient they are with each other is told alike: --join_seconds, --heartbeat_seconds and --save_seconds, or JAX_JOIN_SECONDS,
JAX_HEARTBEAT_SECONDS and JAX_SAVE_SECONDS.
"""

import dataclasses
import ipaddress
import re
import socket
from collections.abc import Mapping

from dip_jax.errors import UserError

FLAGS = ("--coordinator_address", "--num_processes", "--process_id")
_PORTS = (61440, 4096)  # first and count of those that a scheduler's job number is mapped to


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process's place in a run."""

    address: str  # of process 0
    count: int
    index: int
    devices: tuple[int, ...] | None = None  # of this host, where several processes share it; None: all that are visible


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a process waits, in seconds."""

    join: int = 60  # for the others at the start; JAX alone waits five minutes
    heartbeat: int = 30  # for a sign of life of a peer, before it ends itself so that the launcher can restart all
    save: int = 1200  # until a checkpoint is written by all, before the save counts as failed


def find_patience(environment: Mapping[str, str]) -> Patience:
    """What an environment says about waiting.

    Raises:
        UserError: if it is no whole number of seconds.
    """
    said = {}
    for field in dataclasses.fields(Patience):
        text = environment.get(f"JAX_{field.name.upper()}_SECONDS") or str(field.default)
        if not re.fullmatch("[1-9][0-9]*", text):
            raise UserError(f"--{field.name}_seconds={text} must be a whole number of seconds, such as {field.default}")
        said[field.name] = int(text)
    return Patience(**said)


def explain_loopback(member: Membership) -> str:
    """Why a process may be unable to reach process 0: its host's name leads back to this host. Empty where it does not."""
    host = member.address.rpartition(":")[0]
    try:
        found = socket.gethostbyname(host)
    except OSError:
        return ""
    if member.index == 0 or host == found or not ipaddress.ip_address(found).is_loopback:
        return ""
    return (
        f"; {host} is {found} here, which is this host itself: if process 0 runs on another one, mend /etc/hosts or give "
        "its IP address in --coordinator_address"
    )


def find_membership(environment: Mapping[str, str]) -> Membership | None:
    """What an environment (such as `os.environ`) says about this process; None where it works alone.

    Raises:
        UserError: if what is set is incomplete or makes no sense.
    """
    found = _from_slurm(environment) or _from_open_mpi(environment)
    said = {flag: environment.get(f"JAX_{flag[2:].upper()}") for flag in FLAGS}
    if not any(said.values()):
        return found
    address, count, index = said.values()
    if found and address:  # a launcher's own coordinator: the scheduler still knows who is who
        count, index = count or str(found.count), index or str(found.index)
    missing = [flag for flag, value in zip(FLAGS, (address, count, index), strict=True) if not value]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing beside {' and '.join(flag for flag in FLAGS if said[flag])}: give all three "
            "(or the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none"
        )
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--coordinator_address={address} must be HOST:PORT of process 0")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(f"--process_id={index} must be a number from 0 to --num_processes={count} - 1")
    return Membership(address, int(count), int(index), found.devices if found else None)


def _from_slurm(environment: Mapping[str, str]) -> Membership | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in names) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    job, nodes, count, index, place = (environment[name] for name in names)
    host, number = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes).groups()  # "n[001-004,7],m1" begins with n001
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")).group()  # "2(x3)"
    devices = _own_device(environment, place=int(place), processes=int(tasks))
    return Membership(f"{host}{number or ''}:{_port(int(job))}", int(count), int(index), devices)


def _from_open_mpi(environment: Mapping[str, str]) -> Membership | None:
    names = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    if any(name not in environment for name in names) or environment["OMPI_COMM_WORLD_SIZE"] == "1":
        return None
    uri, count, index, place = (environment[name] for name in names)  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    four, six = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri).groups()
    host = four or f"[{six}]"
    devices = _own_device(environment, place=int(place), processes=int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")))
    return Membership(f"{host}:{_port(int(uri.split('.')[0]) >> 12)}", int(count), int(index), devices)


def _port(job: int) -> int:
    first, count = _PORTS
    return first + job % count


def _own_device(environment: Mapping[str, str], *, place: int, processes: int) -> tuple[int, ...] | None:
    """The GPU of one of several processes of a host, unless the scheduler already shows it only that one."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    alone = processes == 1 or (visible is not None and len(visible.split(",")) < processes)
    return None if alone else (place,)
