"""Compiles a feature network for a machine that is not there, in its environment: feature_programs NETWORK MACHINE."""

import json
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import random_inception
import safetensors.numpy
from places import GOLDEN

from dip_jax.metrics import inception, lite0
from dip_jax.planning import ahead, topologies

IMAGES, SIDE = 64, 256


def params_of(network: str):
    """Random weights of the network of FID; the published ones of the other."""
    if network == "lite0":
        return lite0.load()
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        shapes = json.loads((GOLDEN / "inception.json").read_text())["shapes"]
        safetensors.numpy.save_file(random_inception.tensors(shapes), file.name)
        return inception.load(file.name)


def main(network: str, machine: str) -> None:
    features = {"inception": inception.features, "lite0": lite0.features}[network]
    topology = topologies.parse(machine)
    mesh = jax.sharding.Mesh(np.array(topologies.describe_devices(topology)), ("data",))
    whole, split = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params_of(network))
    images = jax.ShapeDtypeStruct((IMAGES, SIDE, SIDE, 3), jnp.uint8, sharding=split)
    with jax.set_mesh(mesh):
        lowered = jax.jit(features).lower(params, images)
    known = {"mesh": dict(mesh.shape), "traced": 0.0, "tpu": topology.is_tpu}
    found = ahead._compile(lowered, known=known, machine_code=not topology.is_tpu, keep=None)
    print(json.dumps({"bytes": found.total_bytes, "collectives": [one.kind for one in found.collectives]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
