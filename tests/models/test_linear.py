"""Parts of a fused product are the same whichever way it is made, and what is converted once is converted as before."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_same, randomise, small
from traced import equations

from dip_jax.config import Mesh
from dip_jax.models import linear
from dip_jax.runtime import sharding, target


@functools.cache
def parts_and_gradients(dtype: str, heads: int | None, *, tpu: bool, devices: int = 1) -> tuple:
    """Three parts of a fused product, and the gradients of a scalar of them by the input and the kernel."""
    x = jax.random.normal(jax.random.key(1), (2, 5, 6)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(2), (6, 3, 8)).astype(dtype)
    weights = jax.random.normal(jax.random.key(3), (3, 2, 5, 8)).astype(dtype)  # the same gradients come in, to the bit

    def value(x, kernel):
        parts = linear.multiply_apart(x, kernel, heads=heads, tpu=tpu)
        return sum(jnp.sum(w.reshape(part.shape) * part) for w, part in zip(weights, parts, strict=True)), parts

    with jax.set_mesh(sharding.make_mesh(Mesh(data=1, tensor=devices), jax.devices()[:devices])):
        kernel = jax.device_put(kernel, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, None, "tensor")))
        (_, parts), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(x, kernel)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (parts, gradients))


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_parts_made_apart_are_those_of_one_product(dtype, tolerance, heads):
    (parts, gradients), expected = (parts_and_gradients(dtype, heads, tpu=tpu) for tpu in (True, False))
    assert parts[0].shape == ((2, 5, 8) if heads is None else (2, 5, heads, 8 // heads))
    assert_same((parts, gradients), expected, tolerance)


def test_a_product_of_halves_on_a_cpu_is_that_of_float32_rounded_once():
    x, kernel = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in ((1, (2, 5, 6)), (2, (6, 3, 8))))
    weights = jax.random.normal(jax.random.key(3), (2, 5, 3, 8), jnp.bfloat16)

    def found(x, kernel, weights):
        y, backward = jax.vjp(linear.dot, x, kernel)
        return y, *backward(weights)

    with jax.set_mesh(sharding.make_mesh(Mesh(), jax.devices()[:1])):
        ours = jax.jit(found)(x, kernel, weights)
    exact = jax.jit(found)(*(array.astype(jnp.float32) for array in (x, kernel, weights)))
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8)  # rounded once: half a unit


@pytest.mark.parametrize("head", ["unet", "mlp"])
def test_a_cpu_is_asked_for_sums_in_float32(head):
    """Where it is not, XLA for CPUs converts both factors first and leaves their units for bfloat16 alone."""
    model = small(head=head, dtype="bfloat16")
    params = jax.eval_shape(model.init, jax.random.key(0))
    given = [jax.ShapeDtypeStruct((2, *model.config.image_size, 3), jnp.float32), jnp.zeros(2), jnp.zeros(2, jnp.int32)]
    with jax.set_mesh(sharding.make_mesh(Mesh(), jax.devices()[:1])):
        step = jax.make_jaxpr(jax.grad(lambda params, x, t, y: jnp.sum(model.apply(params, x, t, y))))(params, *given)
    found = [one for one in equations(step.jaxpr) if one.primitive.name == "dot_general"]
    halves = [one for one in found if one.invars[0].aval.dtype == jnp.bfloat16]
    assert len(halves) > 20
    for one in halves:
        assert {one.invars[1].aval.dtype, one.outvars[0].aval.dtype} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}, one


@pytest.mark.parametrize("tpu", [True, False])
def test_a_tensor_axis_splits_each_part(tpu):
    assert_same(parts_and_gradients("float32", 2, tpu=tpu, devices=2), parts_and_gradients("float32", 2, tpu=tpu), 1e-6)


def loss_and_gradient(model, params, *, once: bool = False) -> tuple:
    x, t, y = jax.random.normal(jax.random.key(2), (2, 16, 8, 3)), jnp.linspace(0.1, 0.9, 2), jnp.arange(2)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(model.convert_once(params) if once else params, x, t, y)))

    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention adds bfloat16 to float32, and is traced again backwards
        return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("scan", [True, False])
def test_kernels_converted_once_give_the_same_bits(scan):
    model = small(head="mlp", dtype="bfloat16", scan_layers=scan)
    params = randomise(jax.jit(model.init)(jax.random.key(1)))
    found, expected = (loss_and_gradient(model, params, once=once) for once in (True, False))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    converted = jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.convert_once, params))
    halves = {jax.tree_util.keystr(path) for path, array in converted if array.dtype == jnp.bfloat16}
    assert halves and all(name.startswith("['blocks") and name.endswith("['kernel']") for name in halves)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_network_as_a_tpu_computes_it_has_the_same_gradient(remat, monkeypatch):
    model = small(head="unet", remat=remat)
    params = randomise(jax.jit(model.init)(jax.random.key(1)))
    expected = loss_and_gradient(model, params)
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    assert_same(loss_and_gradient(model, params), expected, 2e-5)


def kept(model) -> list[tuple[int, ...]]:
    """Shapes of what the backward pass of one block reads, with the batch of two first or last but two."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    given = jax.ShapeDtypeStruct((2, 16, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    label = jax.ShapeDtypeStruct((2,), jnp.int32)
    residuals = jax.eval_shape(lambda p, *rest: jax.vjp(lambda q: model.apply(q, *rest), p)[1], params, *given, label)
    return [leaf.shape for leaf in jax.tree.leaves(residuals)]


@pytest.mark.parametrize(
    ("platform", "qkv", "gate_up"),
    [("", (2, 2, 2, 3, 32), (2, 2, 2, 2, 85)), ("tpu", (2, 32, 2, 2), (2, 2, 2, 85))],
)
def test_rematerialisation_keeps_the_products_and_no_more(platform, qkv, gate_up, monkeypatch):
    """Depth, then images and [N, n, D], or on a TPU [D, images, N]: as its product writes them, the tokens last."""
    monkeypatch.setattr(target, "platform", lambda: platform)
    found = kept(small(head="none", remat="dots"))
    everything = kept(small(head="none", remat="none"))
    assert {qkv, gate_up} <= set(found)
    attention = (2, 1, 2, 2, 2, 2)  # of depth, images, heads and pairs of tokens; kept on no TPU
    assert (attention in everything) == (platform != "tpu") and attention not in found


def test_on_a_tpu_no_more_is_kept_but_the_softmax_s_sums(monkeypatch):
    """Where 16 images of DiP-XL just fit, attention's result is kept instead of the queries."""
    numbers = {}
    for platform in ("", "tpu"):
        monkeypatch.setattr(target, "platform", lambda platform=platform: platform)
        numbers[platform] = sum(math.prod(shape) for shape in kept(small(head="none", remat="dots")))
    assert numbers["tpu"] - numbers[""] == 2 * 2 * 2 * 2  # depth, images, heads and tokens
