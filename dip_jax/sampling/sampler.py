"""From noise to images: solvers of the probability-flow ODE and of its SDE; guidance is in `sampling/guidance.py`.

With x_t = t x + (1 - t) eps, so that t = 0 is noise and t = 1 is data, and v the velocity that the network gives:

    (1)  dx/dt = v(x, t)                                                    probability-flow ODE
    (2)  v = v_u + w (v_c - v_u) where low < t < high, else v_c             guidance on an interval (v_u may be another model's)
    (3)  s_k = k / n, t_k = s_k / (s_k + (1 - s_k) shift), t_n = 1          time grid of n steps, h_k = t_{k+1} - t_k
    (4)  x_{k+1} = x_k + h_k v_k                                            Euler
    (5)  x' = x_k + h_k v_k,  x_{k+1} = x_k + h_k/2 (v_k + v(x', t_{k+1}))  Heun
    (6)  x_{k+1} = x_k + h_k ((1 + r/2) v_k - r/2 v_{k-1}), r = h_k/h_{k-1} Adams-Bashforth 2; its first step is (5)
    (7)  dx = [v + g^2/2 score] dt + g dW,  score = (t v - x) / (1 - t),  g^2 = 2 eta (1 - t)
         x_{k+1} = x_k + h_k (v_k + eta (t_k v_k - x_k)) + sqrt(2 eta (1 - t_k) h_k) z_k      Euler-Maruyama
         and a last step without noise, x_n = x + (1 - t) v: the mean of the data given x
    (8)  x + (1 - t) v                                                      the image expected at t

Each of (4)-(7) is one update, x <- (1 + c) base + a v + b v_old + d z: a solver is a table with one row per network evaluation,
and one `lax.scan` runs the rows. Whether a row is guided is known before compiling: the scan is cut where the interval begins
and where it ends, and outside it the unconditional half of the network does not run.
"""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from dip_jax import config, flow
from dip_jax.sampling.guidance import Guide, is_guided
from dip_jax.typing import Ahead, Images, Labels, Predict, PRNGKey

_NOISE, _PATH = 0, 1  # streams of one sample's key: the start, and the SDE's path


@dataclass(frozen=True)
class Evaluations:
    """A solver's table: J network evaluations in order of time; all columns have length J.

    `starts` marks the evaluation that opens a step; where it is False (Heun's second evaluation) `base` is the x at which the
    step was opened. `v_old` is the velocity at the last evaluation that opened a step.
    """

    time: np.ndarray  # float32, t of the evaluation, in [0, 1]
    guided: np.ndarray  # bool, inside the guidance interval
    starts: np.ndarray  # bool
    new: np.ndarray  # a, float32
    old: np.ndarray  # b, float32
    pull: np.ndarray  # c, float32
    noise: np.ndarray  # d, float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectory:
    """Frames of a sampling run, and where it ended.

    Attributes:
        images: the samples, float32 [B,H,W,C], nominally in [-1, 1].
        times: t of each of the F frames, float32 [F].
        noisy: x_t of each frame, float32 [F,B,H,W,C].
        expected: the image expected at each frame (8), float32 [F,B,H,W,C].
    """

    images: Images
    times: Float[jax.Array, "F"]
    noisy: Float[jax.Array, "F B H W C"]
    expected: Float[jax.Array, "F B H W C"]


def time_grid(sample: config.Sample) -> np.ndarray:
    """The n + 1 times of (3), float64 from 0 (noise) to 1 (data)."""
    s = np.append(np.linspace(0, 1 - 1 / sample.steps, sample.steps), 1.0)
    return s / (s + (1 - s) * sample.t_shift)


def plan(sample: config.Sample) -> Evaluations:
    """The table of network evaluations that `sample` asks for, computed in float64 on the host."""
    t = time_grid(sample)
    h = np.diff(t)
    zero = np.zeros_like(h)
    if sample.solver == "sde":
        eta = sample.sde_noise * (np.arange(len(h)) < len(h) - 1)
        rows = [t[:-1], zero + 1, h * (1 + eta * t[:-1]), zero, -eta * h, np.sqrt(2 * eta * (1 - t[:-1]) * h)]
    else:
        ratio = np.append(0.0, h[1:] / h[:-1]) if sample.solver == "ab2" else zero
        rows = [t[:-1], zero + 1, h * (1 + ratio / 2), -h * ratio / 2, zero, zero]
    table = np.stack(rows, axis=1)
    if sample.solver in ("heun", "ab2"):
        correctors = np.stack([t[1:], zero, h / 2, h / 2, zero, zero], axis=1)
        count = len(h) if sample.solver == "heun" else 1
        pairs = np.stack([table[:count], correctors[:count]], axis=1).reshape(-1, table.shape[1])
        table = np.concatenate([pairs, table[count:]])
    guided = is_guided(table[:, 0], sample)
    time, starts, new, old, pull, noise = table.astype(np.float32).T
    return Evaluations(time=time, guided=guided, starts=starts > 0, new=new, old=old, pull=pull, noise=noise)


def nfe(sample: config.Sample) -> tuple[int, int]:
    """Network evaluations per image: (conditional, unconditional)."""
    guided = plan(sample).guided
    return len(guided), int(guided.sum())


def draw(
    predict: Predict,
    *,
    key: PRNGKey,
    indices: Int[jax.Array, "B"],
    labels: Labels,
    image_shape: tuple[int, ...],
    sample: config.Sample,
    null_label: int,
    scale: Float[jax.Array, ""] | None = None,
    ahead: Ahead | None = None,
    weaker: Predict | None = None,
) -> Images:
    """Draws one image per label. Pure: jit it with everything but `key`, `indices`, `labels` and `scale` static.

    Args:
        predict: (x_t, t, y) -> velocity, float32 [B,H,W,C]; twice the batch inside the guidance interval.
        key: root key. Sample i depends on (key, indices[i], labels[i]) alone, not on the batch it is drawn in.
        indices: which sample each row is, int [B].
        labels: class of each row, int32 [B].
        image_shape: (H, W, C).
        sample: solver, steps, guidance.
        null_label: the unconditional class.
        scale: the guidance scale, float32, where one program is to serve several; by default `sample.guidance`. Which steps
            are guided is still decided by `sample`: none where `sample.guidance` is 1.
        ahead: makes what the network needs of times and labels, for all steps before the first; `predict` then gets its slice
            for (t, y) as a fourth argument.
        weaker: as `predict`, of a model that guides in the place of the unconditional half (`sampling/guidance.py`).

    Returns:
        float32 [B,H,W,C], nominally in [-1, 1].
    """
    table = plan(sample)
    keys, x = _start(key, indices, image_shape)
    guide = Guide(predict, labels, sample.guidance if scale is None else scale, null_label, ahead, weaker)
    x, _ = _integrate(guide, x, keys, table, noisy=sample.solver == "sde", frames=np.array([], np.int32))
    return x


def draw_trajectory(
    predict: Predict,
    *,
    key: PRNGKey,
    indices: Int[jax.Array, "B"],
    labels: Labels,
    image_shape: tuple[int, ...],
    sample: config.Sample,
    null_label: int,
    frames: int,
    scale: Float[jax.Array, ""] | None = None,
    ahead: Ahead | None = None,
    weaker: Predict | None = None,
) -> Trajectory:
    """As `draw`, keeping `frames` of the steps, spread evenly from the first to the last."""
    table = plan(sample)
    kept = np.flatnonzero(table.starts)
    kept = kept[np.linspace(0, len(kept) - 1, min(frames, len(kept))).round().astype(int)]
    keys, x = _start(key, indices, image_shape)
    guide = Guide(predict, labels, sample.guidance if scale is None else scale, null_label, ahead, weaker)
    x, (noisy, expected) = _integrate(guide, x, keys, table, noisy=sample.solver == "sde", frames=kept)
    return Trajectory(images=x, times=jnp.asarray(table.time[kept]), noisy=noisy, expected=expected)


def to_uint8(x: Float[jax.Array, "*B H W C"]) -> UInt8[jax.Array, "*B H W C"]:
    """[-1, 1] -> 0..255: clip(round((x + 1) 127.5), 0, 255), uint8."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _start(key, indices, image_shape):
    """One key per sample, and the noise each starts from."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    return keys, _normal(keys, _NOISE, image_shape)


def _normal(keys, stream, shape):
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape, jnp.float32))(keys)


def _integrate(guide, x, keys, table, *, noisy, frames):
    """Runs the whole table; evaluation `frames[f]` leaves its x_t and its expected image in row f of two buffers."""
    paths = jax.vmap(jax.random.fold_in, (0, None))(keys, _PATH)
    slots = np.full(len(table.time), len(frames), np.int32)  # the row past the last is overwritten by all others
    slots[frames] = np.arange(len(frames))
    buffers = tuple(jnp.zeros((len(frames) + 1, *x.shape), x.dtype) for _ in range(2)) if len(frames) else ()

    def advance(guided, carry, row):
        x, base, v_old, buffers = carry
        t = jnp.broadcast_to(row["time"], x.shape[:1])
        v = guide.velocity(x, t, row["prepared"], guided=guided)
        if buffers:
            shown = (x, flow.to_data(v, x, t))
            buffers = tuple(buffer.at[row["slot"]].set(frame) for buffer, frame in zip(buffers, shown, strict=True))
        base = jnp.where(row["starts"], x, base)
        x = (1 + row["pull"]) * base + row["new"] * v + row["old"] * v_old
        if noisy:
            x = x + row["noise"] * _normal(paths, row["number"], x.shape[1:])
        return (x, base, jnp.where(row["starts"], v, v_old), buffers), None

    carry = (x, x, jnp.zeros_like(x), buffers)
    columns = {**vars(table), "slot": slots, "number": np.arange(len(slots), dtype=np.int32)}
    for segment in _segments(table.guided):
        rows = {name: column[segment] for name, column in columns.items()}
        guided = bool(table.guided[segment.start])
        rows["prepared"] = guide.prepare(rows["time"], guided)
        carry, _ = jax.lax.scan(functools.partial(advance, guided), carry, rows)
    x, _, _, buffers = carry
    return x, tuple(buffer[:-1] for buffer in buffers)


def _segments(flags: np.ndarray) -> list[slice]:
    """The runs of equal flags."""
    cuts = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return [slice(*ends) for ends in itertools.pairwise(cuts)]
