"""The process behind `harness.Nursery`: imports once, then forks a process per request on stdin: training, or any function."""

import importlib
import json
import os
import sys
import time
import traceback

from dip_jax.config import from_dict
from dip_jax.errors import Interrupted, UserError
from dip_jax.jobs.train import train
from faults import injections


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = {"code": wait(request["wait"], request["timeout"])}
        elif pid := os.fork():
            reply = {"pid": pid}
        else:
            live(request)
        print(json.dumps(reply), flush=True)


def wait(pid: int, timeout: float) -> int:
    """Exit code, negative for a signal; kills what does not end in time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return -99


def live(request: dict) -> None:
    """The child: never returns."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    code = 1
    try:
        if request.get("fault"):
            getattr(injections, request["fault"])()
        if "function" in request:
            module, name = request["function"].split(":")
            code = getattr(importlib.import_module(module), name)(*request["arguments"])
        else:
            train(from_dict(request["config"]), workdir=request["workdir"], **request["options"])
            code = 0
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        code = int(stop.code)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
