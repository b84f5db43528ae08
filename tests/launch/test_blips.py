"""`launch/tpu_pod.sh` where gcloud has no answer or refuses: it asks again, and deletes nothing that was not seen gone."""

import json
import os
import shutil
import signal
import subprocess

import launching
import pytest
from places import ROOT

# What gcloud 528 says; all but the quota tried with a server of our own in the place of Google's.
SAYS = "ERROR: (gcloud.compute.tpus.queued-resources.{call}) "
LOGIN = (
    SAYS.format(call="describe") + "You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login"
)
NETWORK = (
    "ERROR: gcloud crashed (ConnectionError): HTTPConnectionPool(host='tpu.googleapis.com', port=443): url: queuedResources/dip"
)
QUOTA = SAYS.format(call="create") + "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptiblePod' has been exceeded."
ELSEWHERE = SAYS.format(call="describe") + "NOT_FOUND: Resource 'projects/dip' was not found."
DESCRIBE, CREATE, DELETE, SCP = (
    "queued-resources describe",
    "queued-resources create",
    "queued-resources delete",
    "tpu-vm scp",
)
ALL = [30, 60, 120, 240, 480]

# What the workers run as PYTHON: counts its starts and ends with the code that SHIM/codes has for this one.
COMMAND = """#!/bin/bash
echo start >>$SHIM/starts.$JAX_PROCESS_ID
trap 'exit 85' TERM
echo "this is worker $JAX_PROCESS_ID"
codes=($(cat $SHIM/codes))
case ${codes[$(wc -l <$SHIM/starts.$JAX_PROCESS_ID) - 1]} in
  wait) while [ ! -e $SHIM/go ]; do /bin/sleep 0.02; done; exit 0 ;;
  preempted) echo SUSPENDED >$SHIM/state; exit 1 ;;
  alone) exit $((86 * JAX_PROCESS_ID)) ;;
  deleted) rm -f $SHIM/state; exit 1 ;;
  *) exit ${codes[$(wc -l <$SHIM/starts.$JAX_PROCESS_ID) - 1]} ;;
esac
"""


class Pod(launching.Pod):
    """`up` with a command that does as it is told, a gcloud with faults, and pauses that are written down instead of waited."""

    def up(self, codes: str, *faults: dict, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        self.prepare(codes, *faults)
        return self("up", "--name=dip", "--zone=here", "--accelerator=cpu", *flags, "train", "--config=x")

    def prepare(self, codes: str, *faults: dict) -> None:
        (self.shim / "codes").write_text(codes)
        (self.shim / "faults").write_text(json.dumps(faults))

    def starts(self, worker: int = 0) -> int:
        file = self.shim / f"starts.{worker}"
        return len(file.read_text().split()) if file.exists() else 0

    def pauses(self) -> list[int]:
        file = self.shim / "slept"
        return list(map(int, file.read_text().split())) if file.exists() else []

    def count(self, call: str) -> int:
        return [" ".join(words[2:4]) for words in self.calls()].count(call)


@pytest.fixture
def pod(tmp_path):
    command = tmp_path / "command"
    command.write_text(COMMAND)
    command.chmod(0o755)
    with Pod(tmp_path, python=command) as pod:
        sleep = pod.shim / "bin" / "sleep"
        sleep.write_text('#!/bin/sh\necho "$1" >>$SHIM/slept\n')
        sleep.chmod(0o755)
        yield pod


@pytest.mark.parametrize(
    ("ended", "error", "code"),
    [("1", LOGIN, 1), ("85", NETWORK, 1), ("1", ELSEWHERE, 1), ("1", "", 0)],
    ids=["login", "network", "elsewhere", "silence"],
)
def test_no_answer_deletes_nothing_and_ends_with_a_line(pod, ended, error, code):
    done = pod.up(ended, {"call": DESCRIBE, "error": error, "code": code, "times": 99, "started": True})
    assert done.returncode == 1, done.stderr
    assert pod.count(DELETE) == 0 and pod.count(CREATE) == 1 and pod.starts() == 1, done.stdout + done.stderr
    assert pod.pauses()[-5:] == ALL
    last = done.stderr.splitlines()[-1]
    assert "the state of dip is unknown" in last and "the last" in last and (error.splitlines() or [""])[0] in last


def test_without_an_answer_at_the_start_nothing_is_asked_for(pod):
    done = pod.up("0", {"call": DESCRIBE, "error": LOGIN, "times": 99})
    assert done.returncode == 1 and pod.count(CREATE) == 0
    assert pod.pauses() == ALL and "active account" in done.stderr.splitlines()[-1]


def test_a_minute_without_network_changes_nothing(pod):
    done = pod.up("1 0", {"call": DESCRIBE, "error": NETWORK, "seconds": 90, "started": True})
    assert done.returncode == 0, done.stderr
    assert pod.count(DELETE) == 0 and pod.count(CREATE) == 1 and pod.starts() == pod.starts(1) == 2
    assert pod.pauses() == [30, 30, 60]  # the request waits; then no network


@pytest.mark.parametrize("started", [False, True])
def test_a_look_that_fails_once(pod, started):
    done = pod.up("1 0", {"call": DESCRIBE, "error": NETWORK, "times": 1, "started": started})
    assert done.returncode == 0, done.stderr
    assert pod.count(DELETE) == 0 and pod.count(CREATE) == 1 and pod.starts() == 2


def test_crashes_are_counted_through_a_blip(pod):
    done = pod.up("1 1 1 1 1", {"call": DESCRIBE, "error": NETWORK, "times": 1, "started": True})
    assert done.returncode == 1 and "three failures in a row" in done.stderr
    assert pod.starts() == 4 and pod.count(DELETE) == 0


def test_a_mistake_is_the_end_also_without_network(pod):
    done = pod.up("2", {"call": DESCRIBE, "error": NETWORK, "times": 99, "started": True})
    assert done.returncode == 2 and "not repeated" in done.stderr.splitlines()[-1]
    assert pod.starts() == 1 and pod.count(DELETE) == 0 and pod.count(CREATE) == 1


def test_a_refused_quota_ends_with_a_line(pod):
    done = pod.up("0", {"call": CREATE, "error": QUOTA, "times": 99})
    assert done.returncode == 1 and pod.starts() == 0
    assert pod.count(CREATE) == 6 and pod.count(DELETE) == 0 and pod.pauses() == ALL
    assert "RESOURCE_EXHAUSTED" in done.stderr and "gcloud refuses to create dip" in done.stderr.splitlines()[-1]


def test_a_quota_that_is_free_again(pod):
    done = pod.up("0", {"call": CREATE, "error": QUOTA, "seconds": 60})
    assert done.returncode == 0, done.stderr
    assert pod.count(CREATE) == 3 and pod.starts() == 1


def test_a_request_that_fails_is_made_anew_a_few_times(pod):
    (pod.shim / "state_of_new_requests").write_text("FAILED")
    done = pod.up("0")
    assert done.returncode == 1 and "three failures in a row" in done.stderr.splitlines()[-1]
    assert pod.count(CREATE) == 4 and pod.count(DELETE) == 3 and pod.starts() == 0


def test_a_preempted_slice_is_seen_to_be_gone_before_it_is_deleted(pod):
    faults = ({"call": DESCRIBE, "error": NETWORK, "times": 2, "started": True}, {"call": DELETE, "error": NETWORK, "times": 1})
    done = pod.up("preempted 0", *faults)
    assert done.returncode == 0, done.stderr
    assert "preempted" in done.stderr and pod.count(DELETE) == 2 and pod.count(CREATE) == 2 and pod.starts() == 2


def test_what_somebody_deleted_is_not_asked_for_again(pod):
    done = pod.up("deleted 0")
    assert done.returncode == 1 and "somebody deleted dip" in done.stderr
    assert pod.count(CREATE) == 1 and pod.starts() == 1


def test_what_somebody_deleted_while_it_waited_is_not_asked_for_again(pod):
    (pod.shim / "bin" / "sleep").write_text("#!/bin/sh\n[ -e $SHIM/once ] || rm $SHIM/state\ntouch $SHIM/once\n")
    done = pod.up("0")
    assert done.returncode == 1 and "somebody deleted dip" in done.stderr.splitlines()[-1]
    assert pod.count(CREATE) == 1 and pod.starts() == 0


def test_a_request_that_is_being_deleted_is_waited_for(pod):
    """Asked for by an `up` before this one, perhaps."""
    (pod.shim / "state").write_text("DELETING")
    (pod.shim / "bin" / "sleep").write_text("#!/bin/sh\ngrep -qs DELETING $SHIM/state && rm $SHIM/state\n")
    assert pod.up("0").returncode == 0
    assert pod.count(CREATE) == 1 and pod.starts() == 1


def test_a_deletion_without_effect_is_tried_a_few_times(pod):
    gcloud = pod.shim / "bin" / "gcloud"
    no = "echo x >>$SHIM/deletions; [ $(wc -l <$SHIM/deletions) -lt 9 ] || rm -f $SHIM/state; exit"
    gcloud.write_text(gcloud.read_text().replace("exec", f'case "$*" in *"resources delete"*) {no} ;; esac\nexec', 1))
    done = pod.up("preempted 0")
    assert done.returncode == 1 and "dip cannot be deleted" in done.stderr.splitlines()[-1]
    assert (pod.shim / "deletions").read_text().split() == ["x"] * 6 and pod.pauses()[-5:] == ALL


def test_workers_without_network_are_no_mistake(pod, tmp_path):
    """No worker can install Python, which is not there: `install.sh` would say that the user has a wrong one."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "grep", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").write_text("#!/bin/bash\ncase $2 in pip) echo no network >&2; exit 2 ;; esac\necho 3.10\n")
    (tools / "python3").chmod(0o755)
    pod.prepare("")
    for action in ("create", "sync"):
        assert pod(action, *launching.SLICE[:2], "--accelerator=cpu").returncode == 0
    waited = len(pod.pauses())
    done = pod("install", *launching.SLICE[:2], "--accelerator=cpu", PATH=f"{pod.shim / 'bin'}:{tools}", PYTHON="")
    assert done.returncode == 1 and "do not answer, or fail, with 1" in done.stderr.splitlines()[-1], done.stderr
    assert pod.pauses()[waited:] == ALL and "no network" in done.stderr and "Python 3.11" not in done.stderr


def test_a_connection_lost_at_the_very_end_is_no_failure(pod):
    """The command is done, and only gcloud's own exit code is not 0."""
    gcloud = pod.shim / "bin" / "gcloud"
    late = '[[ "$*" != *"start="* || -e $SHIM/late ]] || {{ {shim}; touch $SHIM/late; exit 255; }}\nexec {shim}\n'
    gcloud.write_text("#!/bin/bash\n" + late.format(shim=gcloud.read_text().partition("exec ")[2].strip()))
    done = pod.up("0")
    assert done.returncode == 0, done.stderr
    assert (pod.shim / "late").exists() and pod.starts() == pod.starts(1) == 1


def test_what_one_worker_alone_ended_with_counts(pod):
    done = pod.up("alone")
    assert done.returncode == 86 and "ended with 86: not repeated" in done.stderr.splitlines()[-1]
    assert pod.starts() == pod.starts(1) == 1


def test_workers_out_of_reach_are_no_crash(pod):
    done = pod.up("0", {"call": SCP, "error": NETWORK, "times": 4})
    assert done.returncode == 0, done.stderr
    assert pod.pauses() == [30, *ALL[:4]] and pod.starts() == 1 and pod.count(CREATE) == 1


@pytest.mark.parametrize("command", ["up", "run"])
def test_a_lost_connection_is_made_again_and_nothing_is_started_twice(pod, command):
    pod.prepare("wait 1")
    if command == "run":
        assert pod("create", *launching.SLICE).returncode == 0 and pod("sync", *launching.SLICE).returncode == 0
    (pod.shim / "cut").touch()
    done = pod(command, *launching.SLICE, "train", "--config=x")
    assert done.returncode == 0, done.stderr
    assert pod.starts(0) == pod.starts(1) == 1
    assert "the connection to the command is lost" in done.stderr and "this is worker 1" in done.stdout


def test_a_command_that_still_runs_is_taken_over(pod):
    """`up` could reach nobody any more and ended; `up` again."""
    (pod.shim / "cut").touch()
    done = pod.up("wait 1", {"call": DESCRIBE, "error": NETWORK, "times": 6, "started": True})
    assert done.returncode == 1 and pod.starts() == 1 and not (pod.shim / "go").exists()
    done = pod("run", *launching.SLICE, "train", "--config=x")
    assert done.returncode == 0 and pod.starts() == 1 and "this is worker" in done.stdout


def test_ctrl_c_stops_the_command_and_waits_for_it(pod):
    pod.prepare("wait 0")
    command = ["bash", "launch/tpu_pod.sh", "up", *launching.SLICE, "train", "--config=x"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=pod.environment(), **pipes) as process:
        said = ""
        while "this is worker" not in said:
            said = process.stdout.readline()
            assert said, "it ended too early"
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    for worker in "01":
        assert (pod.shim / "workers" / worker / "dip_jax/logs/exit").read_text().strip() == "85"
    assert pod.starts() == 1 and pod.count(DELETE) == 0
