"""Real processes under `jax.distributed`: the shards that they hold are the global batch, on meshes that cut it differently."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from places import ROOT, SUPPORT
from small_data import write_dataset

from dip_jax.data import order

COUNT, BATCH, START, STEPS = 23, 8, 4, 3

HOST = """
    import json, sys
    import jax, numpy as np
    from small_data import number_of
    from dip_jax import config
    from dip_jax.data import pipeline, prepared
    from dip_jax.runtime import sharding

    if __name__ == "__main__":
        address, count, rank, folder, mesh, workers = sys.argv[1:]
        jax.distributed.initialize(address, int(count), int(rank))
        mesh = sharding.make_mesh(config.Mesh(*json.loads(mesh)))
        data = config.Data(batch_size=8, num_threads=2, num_workers=int(workers))
        dataset = prepared.open_dataset(folder)
        batches = pipeline.batches(dataset, data, mesh=mesh, image_size=4, num_classes=5, seed=3, start_step=4)
        held = []
        for _ in range(3):
            batch = next(batches)
            rows = {}
            for shard in batch["image"].addressable_shards:
                start = shard.index[0].indices(8)[0]
                rows |= {start + k: number_of(image) for k, image in enumerate(np.asarray(shard.data))}
            held.append(rows)
        batches.close()
        print(json.dumps(held))
"""


def run(folder, tmp_path, *, hosts: int, mesh: list[int], workers: int) -> list[list[dict[str, int]]]:
    """What each of `hosts` processes holds: per step, row -> number of the image."""
    script = tmp_path / "host.py"
    script.write_text(textwrap.dedent(HOST))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // hosts}",
        "PYTHONPATH": f"{ROOT}:{SUPPORT}",
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, script, address, str(hosts), str(rank), folder, json.dumps(mesh), str(workers)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(hosts)
    ]
    return [json.loads(job.communicate(timeout=300)[0].splitlines()[-1]) for job in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("hosts, workers", [(2, 0), (2, 2), (4, 0)])
@pytest.mark.parametrize("mesh", [[8, 1, 1], [2, 2, 2], [1, 1, 8]], ids=str)
def test_hosts_hold_the_global_batch(tmp_path, hosts, workers, mesh):
    dataset = write_dataset(tmp_path / "data", COUNT)
    held = run(dataset.folder, tmp_path, hosts=hosts, mesh=mesh, workers=workers)
    for k in range(STEPS):
        expected = order.batch_indices(COUNT, batch_size=BATCH, seed=3, step=START + k).tolist()
        union = {}
        for host in held:
            union |= host[k]
            assert len(host[k]) == (BATCH if mesh[2] == 8 else BATCH // hosts)  # no host reads rows that it does not hold
        assert union == {str(row): number for row, number in enumerate(expected)}
