"""What a child of the fault harness runs as one of several hosts."""

import hashlib
import json
import os
import pathlib

import jax
import numpy as np
import toy_network

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.checkpoints import checkpoint
from dip_jax.errors import UserError
from dip_jax.jobs.train import train
from dip_jax.models import dip
from dip_jax.runtime import distributed, sharding
from dip_jax.sampling import sample_files
from dip_jax.training import optim, state


def command(*argv: str) -> int:
    """`python -m dip_jax ARGV` with the toy feature network."""
    toy_network.install()
    return main([*argv])


def command_on_own_disk(folder: str, *argv: str) -> int:
    """As `command`; relative paths of each process lie in a folder of its own."""
    place = pathlib.Path(folder) / os.environ["JAX_PROCESS_ID"]
    place.mkdir()
    os.chdir(place)
    return command(*argv)


def command_failing_on_host_1(*argv: str) -> int:
    """As `command`; the second host cannot write."""
    write = sample_files.NpzFile.write

    def fail(self, batch, images):
        if jax.process_index() == 1:
            raise UserError("no room on host 1")
        write(self, batch, images)

    sample_files.NpzFile.write = fail
    return command(*argv)


def train_judged(values: dict, workdir: str, delay: float) -> int:
    """Training in which every call of the feature network takes `delay` seconds."""
    toy_network.install(delay=delay)
    train(config.from_dict(values), workdir=workdir)
    return 0


def restore(values: dict, workdir: str) -> int:
    """Restores the newest step; prints how many bytes this process read for it, and a digest of what its first device holds."""
    run = config.from_dict(values)
    distributed.start()
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh), sharding.use_rules(()):
        model = dip.from_config(run.model)
        optimizer = optim.make_optimizer(run.optim, total_steps=run.train.steps)
        target = state.abstract_state(model, optimizer, state.state_shardings(model, optimizer, mesh))
        checkpoints = checkpoint.Checkpoints(workdir, run.checkpoint)
        found = checkpoints.find()
        before = _bytes_read()
        restored = jax.block_until_ready(checkpoints.restore(found, target))
        count = _bytes_read() - before
        checkpoints.close()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(restored):
        digest.update(np.asarray(leaf.addressable_shards[0].data).tobytes())
    print(json.dumps({"bytes": count, "digest": digest.hexdigest()}), flush=True)
    return 0


def _bytes_read() -> int:
    """By this process since its start, by Linux's count, from disk or from memory."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])
