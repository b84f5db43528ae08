"""What a child of the fault harness runs as one of several hosts."""

import jax
import toy_network

from dip_jax import config
from dip_jax.__main__ import main
from dip_jax.errors import UserError
from dip_jax.jobs.train import train
from dip_jax.sampling import sample_files


def command(*argv: str) -> int:
    """`python -m dip_jax ARGV` with the toy feature network."""
    toy_network.install()
    return main([*argv])


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
