"""Who is who, from the environments that launchers set; what hosts tell each other when they differ."""

import importlib
import os
import subprocess
import sys

import pytest
from absl import flags
from places import ROOT

from dip_jax.__main__ import main
from dip_jax.errors import Exit, UserError
from dip_jax.runtime import command_line, distributed, membership
from dip_jax.runtime.membership import Membership, Patience, find_membership, find_patience

OWN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": f"{7 * 4096}.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_alone_where_nothing_is_set():
    assert find_membership({}) is None
    assert find_membership({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun of one task
    assert find_membership({"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8"}) is None  # the batch shell itself
    assert find_membership({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_what_is_set_by_hand():
    assert find_membership(OWN) == Membership("10.0.0.1:1234", 4, 3)
    assert find_membership({**SLURM, **OWN}) == Membership("10.0.0.1:1234", 4, 3, (1,))


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "prepare"])
def test_flags_of_every_job_go_before_the_environment(monkeypatch, capsys, command):
    for name, value in (SLURM | OWN).items():
        monkeypatch.setenv(name, value)
    values = flags.FlagValues()
    job = importlib.import_module(f"dip_jax.jobs.{command}")
    job.define_flags(values)
    required = ["--source=photo_crops", "--out=x"] if command == "prepare" else []
    argv = [
        *required,
        "--coordinator_address=head:4321",
        "--num_processes=3",
        "--process_id=0",
        "--join_seconds=150",
        "--save_seconds=7",
    ]
    monkeypatch.setenv("JAX_JOIN_SECONDS", "20")
    monkeypatch.setenv("JAX_HEARTBEAT_SECONDS", "90")
    command_line.parse(values, command, argv)
    assert find_patience(os.environ) == Patience(join=150, heartbeat=90, save=7)
    assert find_membership(os.environ) == Membership("head:4321", 3, 0, (1,))
    assert main([command, *required, "--process_id=-1"]) == Exit.USER_ERROR
    assert "process_id" in capsys.readouterr().err


def test_slurm():
    assert find_membership(SLURM) == Membership(f"gpu007:{61440 + 5000 % 4096}", 8, 5, (1,))
    for nodes, host in (("n1", "n1"), ("n1,n2", "n1"), ("a-b3[4,7-9]", "a-b34")):
        assert find_membership({**SLURM, "SLURM_STEP_NODELIST": nodes}).address.startswith(f"{host}:")


def test_slurm_tells_the_count_where_only_the_address_is_set():
    found = find_membership({**SLURM, "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"})
    assert (found.address, found.count, found.index) == ("127.0.0.1:9", 8, 5)


@pytest.mark.parametrize(
    ("changed", "devices"),
    [
        ({}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # the scheduler binds each task to its own
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # one task per node takes all GPUs
    ],
)
def test_tasks_of_a_node_share_its_gpus(changed, devices):
    assert find_membership({**SLURM, **changed}).devices == devices


def test_open_mpi():
    assert find_membership(OPEN_MPI) == Membership("10.96.0.1:61447", 2, 1, (1,))
    six = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"}
    assert find_membership(six).address == "[fe80::b9b:ac5d]:61441"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"JAX_NUM_PROCESSES": ""}, "--num_processes missing beside --coordinator_address and --process_id"),
        ({"JAX_COORDINATOR_ADDRESS": "", "JAX_PROCESS_ID": ""}, "--coordinator_address and --process_id missing"),
        ({"JAX_PROCESS_ID": "4"}, "from 0 to --num_processes=4 - 1"),
        ({"JAX_PROCESS_ID": "one"}, "--process_id=one"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "must be HOST:PORT"),
    ],
)
def test_what_makes_no_sense(changed, words):
    with pytest.raises(UserError, match=words):
        find_membership({**OWN, **changed})


def test_patience():
    assert find_patience({}) == find_patience({"JAX_JOIN_SECONDS": ""}) == Patience(join=60, heartbeat=30, save=1200)
    for text in ("0", "-5", "1.5", "soon"):
        with pytest.raises(UserError, match=f"--join_seconds={text} must be a whole number of seconds, such as 60"):
            find_patience({"JAX_JOIN_SECONDS": text})


@pytest.mark.parametrize(
    ("address", "index", "leads_back"),
    [("head:1", 1, True), ("head:1", 0, False), ("other:1", 1, False), ("127.0.1.1:1", 1, False), ("unknown:1", 1, False)],
)
def test_a_name_that_leads_back_to_this_host_is_the_cause(monkeypatch, address, index, leads_back):
    names = {"head": "127.0.1.1", "other": "10.0.0.7", "127.0.1.1": "127.0.1.1"}

    def look_up(host):
        if host not in names:
            raise OSError(f"{host} is unknown")
        return names[host]

    monkeypatch.setattr(membership.socket, "gethostbyname", look_up)
    found = membership.explain_loopback(Membership(address, 2, index))
    assert ("head is 127.0.1.1 here, which is this host itself" in found) == bool(found) == leads_back


def test_who_waits_in_vain_is_told_the_flag_and_the_cause(tmp_path):
    flags = ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1", "--join_seconds=2"]
    argv = [sys.executable, "-m", "dip_jax", "train", f"--config={ROOT / 'configs' / 'demo.py'}", "--workdir=run", *flags]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == Exit.CRASH
    line = next(line for line in done.stderr.splitlines() if line.startswith("dip_jax: "))
    assert line.startswith("dip_jax: process 1 of 2 waited 2 s for the others at localhost:1: is every process started")
    assert "--join_seconds=6 waits longer; localhost is 127.0.0.1 here, which is this host itself" in line
    assert not list(tmp_path.iterdir())


def test_facts_are_compared_one_by_one():
    assert distributed._flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": "1", "a.c": "[1, 2]", "d": "null"}


def test_the_code_has_one_version():
    assert distributed.code_version() == distributed.code_version() and len(distributed.code_version()) == 16
