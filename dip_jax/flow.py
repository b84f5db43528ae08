"""Flow matching on a straight path (section 3.1; time runs from noise at t = 0 to data at t = 1).

    (1)  x_t = t x + (1 - t) eps                         path
    (2)  v   = x - eps                                   target velocity, d x_t / d t
    (3)  t   = sigmoid(m + s n),  n ~ N(0, 1)            time distribution (logit-normal)
    (4)  t  <- t / (t + (1 - t) shift)                   shift towards noise for shift > 1
    (5)  loss = mean over pixels of |v_hat - v|^2        eq. 5 of the paper
    (6)  x = x_t + (1 - t) v,   eps = x_t - t v          what a velocity says about data and noise
    (7)  v = (x_hat - x_t) / (1 - t)                     x prediction as a velocity
    (8)  v = (x_t - eps_hat) / t                         eps prediction as a velocity

Everything here is float32 and knows no network: it is given a predict function (x_t, t, y) -> prediction.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dip_jax.config import Flow, Model
from dip_jax.typing import Images, Labels, Predict, PRNGKey, Times


def shift_times(t: Float[Array, "*S"], shift: float) -> Float[Array, "*S"]:
    """Equation 4. `t` in [0, 1]; shift 1 is the identity."""
    return t / (t + (1 - t) * shift)


def sample_times(key: PRNGKey, num: int, *, flow: Flow) -> Times:
    """`num` training times in (0, 1): equations 3 and 4."""
    normal = jax.random.normal(key, (num,), jnp.float32)
    return shift_times(jax.nn.sigmoid(flow.t_mean + flow.t_std * normal), flow.t_shift)


def interpolate(x: Images, eps: Images, t: Times) -> Images:
    """The noisy image x_t of equation 1; `x` in [-1, 1], `eps` standard normal."""
    t = _per_image(t)
    return t * x + (1 - t) * eps


def velocity(x: Images, eps: Images) -> Images:
    """The target of equation 2."""
    return x - eps


def to_velocity(prediction: Images, x_t: Images, t: Times, *, model: Model) -> Images:
    """What the network said, as a velocity: identity for v, equations 7 and 8 for x and eps (`model.prediction`).

    The denominators are floored at `model.t_clip`, where the division would otherwise blow up.
    """
    t = _per_image(t)
    if model.prediction in ("x", "asym"):  # the network says s and gives it as an image (`models/asym.py`)
        return (prediction - x_t) / jnp.maximum(1 - t, model.t_clip)
    if model.prediction == "eps":
        return (x_t - prediction) / jnp.maximum(t, model.t_clip)
    return prediction


def to_data(v: Images, x_t: Images, t: Times) -> Images:
    """The clean image that a velocity points to: equation 6."""
    return x_t + (1 - _per_image(t)) * v


def drop_labels(key: PRNGKey, y: Labels, *, rate: float, null_label: int) -> Labels:
    """Replaces each label by the null class with probability `rate`, for classifier-free guidance."""
    dropped = jax.random.bernoulli(key, rate, y.shape)
    return jnp.where(dropped, jnp.asarray(null_label, y.dtype), y)


@struct.dataclass
class Corrupted:
    """A batch ready for the network, and what it must predict: v, x or eps. Everything random has been drawn."""

    x_t: Images
    t: Times
    y: Labels
    target: Images


def corrupt(key: PRNGKey, x: Images, y: Labels, *, flow: Flow, model: Model) -> Corrupted:
    """Draws times, noise and dropped labels for clean images: equations 1 to 4.

    Args:
        key: names everything drawn here.
        x: images in [-1, 1].
        y: labels in [0, num_classes).
        flow: the section of the config.
        model: gives the quantity to predict and the number of classes, which is the null label.
    """
    key_times, key_noise, key_labels = jax.random.split(key, 3)
    t = sample_times(key_times, x.shape[0], flow=flow)
    eps = jax.random.normal(key_noise, x.shape, jnp.float32)
    target = {"v": velocity(x, eps), "x": x, "asym": x, "eps": eps}[model.prediction]
    y = drop_labels(key_labels, y, rate=flow.label_dropout, null_label=model.num_classes)
    return Corrupted(x_t=interpolate(x, eps, t), t=t, y=y, target=target)


def loss(predict: Predict, batch: Corrupted, *, model: Model) -> Float[Array, ""]:
    """Equation 5: mean squared error of the velocity over all pixels of the batch, weight 1 at every time.

    Where x or eps is predicted, prediction and target both become velocities first, with the same floor, so that the
    three kinds differ in what the network outputs and not in what is asked of it (Li and He, "Back to Basics", 2025).
    """
    return error(predict(batch.x_t, batch.t, batch.y), batch, model=model)


def error(prediction: Images, batch: Corrupted, *, model: Model) -> Float[Array, ""]:
    """`loss` of what a network said of the batch."""
    said = to_velocity(prediction, batch.x_t, batch.t, model=model)
    return jnp.mean(jnp.square(said - to_velocity(batch.target, batch.x_t, batch.t, model=model)))


def _per_image(t: Times) -> Float[Array, "B 1 1 1"]:
    return t[:, None, None, None]
