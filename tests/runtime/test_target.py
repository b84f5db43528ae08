"""A program is decided by the mesh that it is traced for, not by the machine that traces it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from small_models import small

from dip_jax import config
from dip_jax.models import folding, layers
from dip_jax.runtime import sharding, target

AUTO = (AxisType.Auto,) * 3


def mesh_of(platform: str, count: int = 1) -> AbstractMesh:
    device = AbstractDevice(device_kind=f"some {platform}", num_cores=None, platform=platform)
    return AbstractMesh((count, 1, 1), sharding.AXES, axis_types=AUTO, abstract_device=device)


@pytest.mark.parametrize(("platform", "attention", "groups"), [("cpu", "xla", 2), ("gpu", "cudnn", 1), ("tpu", "xla", 1)])
def test_the_mesh_decides(platform, attention, groups, monkeypatch):
    model = small(head="unet").config
    monkeypatch.setattr(folding, "GROUP_BYTES", 1)

    def decided():
        chosen = layers.attention_implementation("auto", jnp.bfloat16, tokens=256, head_dim=72)
        return chosen, folding.count_groups(model, images=1, patches=2)

    assert decided() == ("xla", 1)  # no mesh: what runs anywhere
    with jax.sharding.use_abstract_mesh(mesh_of(platform)):
        assert target.platform() == platform and decided() == (attention, groups)
        with target.everywhere():
            assert decided() == ("xla", 1)
        assert target.platform() == platform


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ({}, "cudnn"),
        ({"tokens": 67}, "xla"),  # 64 tokens of the image and 3 of its class: cuDNN's backward pass refuses an odd number
        ({"tokens": 257, "frozen": True}, "cudnn"),  # the teacher has no backward pass
        ({"head_dim": 12}, "xla"),
        ({"head_dim": 136}, "xla"),
        ({"dtype": jnp.float32}, "xla"),
        ({"tokens": 67, "choice": "cudnn"}, "cudnn"),  # whoever names it gets it, or its error
    ],
)
def test_a_gpus_attention_is_cudnns_where_it_takes_the_sizes(changed, chosen):
    asked = {"choice": "auto", "dtype": jnp.bfloat16, "tokens": 256, "head_dim": 72} | changed
    with jax.sharding.use_abstract_mesh(mesh_of("gpu")):
        assert layers.attention_implementation(asked.pop("choice"), asked.pop("dtype"), **asked) == chosen


def test_a_real_mesh_is_read_inside_jit():
    seen = []
    with jax.set_mesh(sharding.make_mesh(config.Mesh(), jax.devices()[:1])):
        jax.eval_shape(lambda x: seen.append(target.platform()) or x, 1.0)
        jax.jit(lambda x: seen.append(target.platform()) or x)(1.0)
    assert seen == ["cpu", "cpu"]


def test_the_network_traced_for_another_platform_is_that_platforms(monkeypatch):
    """On a CPU half-precision attention is computed in float32; a TPU's program, traced here, is not."""
    model = small(head="none", dtype="bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("the tracing machine was asked what it is"))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((2, 16, 8, 3), "float32"), ((2,), "float32"))]
    params, label = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((2,), jnp.int32)

    @functools.cache
    def softmax_inputs(platform: str) -> str:
        with jax.sharding.use_abstract_mesh(mesh_of(platform)):
            return str(jax.make_jaxpr(lambda *arguments: model.apply(*arguments))(params, *shapes, label))

    assert softmax_inputs("cpu") != softmax_inputs("tpu")
    assert softmax_inputs("cpu").count("f32[2,2,2,16]") > softmax_inputs("tpu").count("f32[2,2,2,16]")


@pytest.mark.parametrize(("kind", "limit"), [("TPU v5", 32768), ("TPU v6 lite", 65536), ("NVIDIA H100", None), ("cpu", None)])
def test_a_tpu_s_compiler_may_fill_half_of_its_own_memory(kind, limit, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert target.compiler_options(kind) == ({} if limit is None else {"xla_tpu_scoped_vmem_limit_kib": str(limit)})
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304")
    assert target.compiler_options(kind) == {}, "what the user says stands"


def test_what_runs_once_is_compiled_quickly_to_the_same_bits(monkeypatch):
    model, key = small(head="unet"), jax.random.key(3)
    assert target.once_options("cpu") == {}  # the tests have a level of their own in XLA_FLAGS
    monkeypatch.delenv("XLA_FLAGS")
    assert target.once_options("gpu") == target.once_options("tpu") == {}
    assert target.once_options("cpu") == {"xla_backend_optimization_level": 1}
    usual = {"xla_backend_optimization_level": 3}
    plain, quick = (jax.jit(model.init, compiler_options=each)(key) for each in (usual, target.once_options("cpu")))
    jax.tree.map(np.testing.assert_array_equal, plain, quick)
