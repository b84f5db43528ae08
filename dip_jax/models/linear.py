"""Named parameters and linear maps, of which several may share an input and a kernel.

Parameters are float32; products run in the module's `dtype`. `PRODUCT` marks what rematerialisation "dots" keeps of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dip_jax.models.rounding import add
from dip_jax.runtime import target
from dip_jax.typing import Axes

PRODUCT = "product"

Initializer = Callable[..., jax.Array]


class Named(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter in a box that carries its logical axis names, and nothing that acts on them."""

    value: Any
    axes: Axes = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The array itself; where it lives is decided by the sharding of the whole state."""
        return self.value

    def replace_boxed(self, val: Any) -> "Named":
        """The same names on another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Named":
        """Called by `nn.scan`: the stacked parameter gains the axis named in its metadata."""
        axes = list(self.axes)
        axes.insert(index, params[nn.PARTITION_NAME])
        return self.replace(axes=tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Named":
        """Inverse of `add_axis`."""
        axes = list(self.axes)
        del axes[index]
        return self.replace(axes=tuple(axes))


def named(init: Initializer, axes: Axes) -> Initializer:
    """`init(key, shape)` whose result carries the logical names of its axes."""
    return lambda key, shape: Named(init(key, shape), axes)


def uniform(bound: float) -> Initializer:
    """U(-bound, bound) in float32."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def normal(std: float) -> Initializer:
    """N(0, std) in float32."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros, float32."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Ones, float32."""
    return jnp.ones(shape, jnp.float32)


def fan_in_uniform(fan_in: int) -> Initializer:
    """U(+-1/sqrt(fan_in)), the initialisation that the backbone's family uses for weights and biases alike."""
    return uniform(1 / math.sqrt(fan_in))


# How a linear map starts: (fan_in, fan_out) -> (kernel initialiser, bias initialiser).
INITS: dict[str, Callable[[int, int], tuple[Initializer, Initializer]]] = {
    "fan_in": lambda i, o: (fan_in_uniform(i), fan_in_uniform(i)),
    "he": lambda i, o: (uniform(math.sqrt(6 / i)), fan_in_uniform(i)),
    "normal": lambda i, o: (normal(0.02), fan_in_uniform(i)),
    "xavier": lambda i, o: (uniform(math.sqrt(6 / (i + o))), zeros),
    "zeros": lambda i, o: (zeros, zeros),
}


def unstack(x: jax.Array, axis: int) -> list[jax.Array]:
    """The slices of x along `axis`, without it; the gradient is one concatenation."""
    axis = axis % x.ndim
    return [lax.squeeze(part, [axis]) for part in lax.split(x, [1] * x.shape[axis], axis)]


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I], kernel [I, *F] -> [..., *F], marked."""
    return checkpoint_name(dot(x, kernel), PRODUCT)


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I], kernel [I, *F] -> [..., *F] in x's dtype.

    A CPU has units for products of bfloat16 that are summed in float32 (AMX), and XLA uses them where such a sum is asked for;
    otherwise it computes in float32. Both sum in float32 and round once, here and in the gradients.
    """
    return _dot_on_cpu(x, kernel) if x.dtype == jnp.bfloat16 and target.platform() == "cpu" else _plain_dot(x, kernel)


def _plain_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _contract(x: jax.Array, y: jax.Array, of_x: Sequence[int], of_y: Sequence[int]) -> jax.Array:
    return lax.dot_general(x, y, ((of_x, of_y), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _dot_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _contract(x, kernel, [x.ndim - 1], [0])


def _dot_on_cpu_backward(kept: tuple[jax.Array, jax.Array], y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    lead = range(x.ndim - 1)
    return _contract(y, kernel, range(x.ndim - 1, y.ndim), range(1, kernel.ndim)), _contract(x, y, lead, lead)


_dot_on_cpu.defvjp(lambda x, kernel: (_dot_on_cpu(x, kernel), (x, kernel)), _dot_on_cpu_backward)


@jax.custom_vjp
def products(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """x [..., I], kernel [I, n, D] -> n products [..., D]. The gradient by x is summed in float32, as that of one product."""
    return tuple(_plain_dot(x, kernel[:, i]) for i in range(kernel.shape[1]))


def _products_backward(
    kept: tuple[jax.Array, jax.Array], ys: tuple[jax.Array, ...], turned: bool = False
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    lead, features = tuple(range(x.ndim - 1)), 0 if turned else x.ndim - 1
    of_y, exact = tuple(axis for axis in range(x.ndim) if axis != features), {"preferred_element_type": jnp.float32}
    of_x = [lax.dot_general(y, kernel[:, i], (((features,), (1,)), ((), ())), **exact) for i, y in enumerate(ys)]
    of_kernel = jnp.stack([lax.dot_general(x, y, ((lead, of_y), ((), ()))) for y in ys], axis=1)
    return sum(of_x[1:], start=of_x[0]).astype(x.dtype), of_kernel


products.defvjp(lambda x, kernel: (products(x, kernel), (x, kernel)), _products_backward)


@jax.custom_vjp
def turned_products(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """x [..., N, I], kernel [I, n, D] -> n products [D, ..., N], the tokens last; otherwise as `products`."""
    return tuple(lax.dot_general(kernel[:, i], x, (((0,), (x.ndim - 1,)), ((), ()))) for i in range(kernel.shape[1]))


turned_products.defvjp(lambda x, kernel: (turned_products(x, kernel), (x, kernel)), partial(_products_backward, turned=True))


class Linear(nn.Module):
    """x [..., I] -> [..., *features], computed in `dtype`; several features axes make one fused product.

    Attributes:
        features: output axes, e.g. (D,) or (3, D) for queries, keys and values at once.
        axes: logical names of the kernel [I, *features]; the bias takes those of `features`.
        init: row of INITS.
    """

    features: tuple[int, ...]
    axes: Axes
    bias: bool = True
    init: str = "fan_in"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = x.shape[-1]
        kernel_init, bias_init = INITS[self.init](fan_in, math.prod(self.features))
        kernel = self.param("kernel", named(kernel_init, self.axes), (fan_in, *self.features))
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias:
            b = self.param("bias", named(bias_init, self.axes[1:]), self.features)
            y = add(y, b)
        return y


class Fused(nn.Module):
    """x [..., I] -> n parts [..., D], or [..., heads, D / heads], of one kernel [I, n, D] without biases.

    One product, and its slices; on a TPU a product per part. There [..., n, D] fills no tiles, and attention reads the tokens
    last (128 of them fill a tile, 72 numbers of a head do not): made and kept in another order, both are copied.

    Attributes:
        features, axes: as of `Linear`.
        heads: split D into so many; for attention.
    """

    features: tuple[int, int]
    axes: Axes
    heads: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        fan_in = x.shape[-1]
        kernel_init, _ = INITS["fan_in"](fan_in, math.prod(self.features))
        kernel = self.param("kernel", named(kernel_init, self.axes), (fan_in, *self.features))
        return multiply_apart(x.astype(self.dtype), kernel.astype(self.dtype), heads=self.heads, tpu=target.platform() == "tpu")


def multiply_apart(x: jax.Array, kernel: jax.Array, *, heads: int | None, tpu: bool) -> list[jax.Array]:
    """The parts that `Fused` returns, by the way that suits a TPU or by the other."""
    if not tpu:
        y = product(x, kernel)
        return unstack(y if heads is None else y.reshape(*y.shape[:-1], heads, -1), -2 if heads is None else -3)
    if heads is None:
        return [checkpoint_name(y, PRODUCT) for y in products(x, kernel)]
    queries, *others = turned_products(x, kernel)  # attention keeps its result, and makes the queries again instead
    turned = (jnp.moveaxis(y, 0, -2) for y in (queries, *(checkpoint_name(y, PRODUCT) for y in others)))
    return [jnp.moveaxis(y.reshape(*y.shape[:-2], heads, -1, y.shape[-1]), -1, -3) for y in turned]


def modulation(parts: int, width: int, **fields: Any) -> Linear:
    """The linear map of adaLN: c [..., D] -> [..., parts, width]; `fields` are further attributes of `Linear`."""
    return Linear((parts, width), ("embed", None, "modulation"), **fields)
