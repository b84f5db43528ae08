"""How fast the steps go, what part of the accelerator's peak that is, and what they wait for."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from dip_jax.config import Config
from dip_jax.runtime import accelerators, goodput
from dip_jax.training import workload
from dip_jax.training.repa import Alignment


class Pace:
    """Measures from one logged row to the next; what is not training (compiling, saving, sampling) is left out by `restart`.

    Args:
        start: steps done before.
        batch_size: images per step, of all devices.
        flops_per_image: of a training step.
        peak_flops: per second, of all devices together; None where it is not known.
        on_wait: called with the seconds of every wait for data that counts.
    """

    def __init__(
        self,
        *,
        start: int,
        batch_size: int,
        flops_per_image: int,
        peak_flops: float | None,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ):
        self._on_wait = on_wait
        self._batch_size, self._flops, self._peak = batch_size, batch_size * flops_per_image, peak_flops
        self.restart(start)

    def restart(self, step: int) -> None:
        """Begins anew at a step that was just finished."""
        self._clock, self._at, self._waited = time.monotonic(), step, 0.0

    @contextlib.contextmanager
    def waiting(self, devices_idle: Callable[[], bool]) -> Iterator[None]:
        """The block waits for data: counted where the devices have nothing left to do at its end, as they waited as well."""
        since = time.monotonic()
        yield
        if devices_idle():
            seconds = time.monotonic() - since
            self._waited += seconds
            self._on_wait(seconds)

    def measure(self, step: int) -> dict[str, float]:
        """What was measured since the last call, and begins anew; empty where no step was done in between.

        Returns:
            images_per_second; seconds_per_step; data_wait: the share of time in which nothing but the data was waited for;
            mfu: model FLOPs over the bf16 peak of all devices, a share; left out where the peak is not known.
        """
        steps, now = step - self._at, time.monotonic()
        if steps <= 0 or now <= self._clock:
            return {}
        elapsed = now - self._clock
        found = {
            "images_per_second": steps * self._batch_size / elapsed,
            "seconds_per_step": elapsed / steps,
            "data_wait": min(self._waited / elapsed, 1.0),
        }
        if self._peak:
            found["mfu"] = steps * self._flops / elapsed / self._peak
        self._clock, self._at, self._waited = now, step, 0.0
        return found


def for_run(
    options: Config, mesh: jax.sharding.Mesh, alignment: Alignment | None, *, start: int, ledger: goodput.Ledger
) -> Pace:
    """The pace of a run on the devices of a mesh; the ledger gets what was waited for data."""
    peak = accelerators.peak_flops(mesh.devices.flat[0].device_kind)
    return Pace(
        start=start,
        batch_size=options.data.batch_size,
        flops_per_image=workload.step_flops(options.model, alignment),
        peak_flops=peak and peak * mesh.size,
        on_wait=lambda seconds: ledger.move(seconds, "data"),
    )


def device_memory() -> dict[str, int]:
    """Bytes of the fullest of this process's devices: memory_in_use now, memory_peak so far; empty where none tells (a CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_in_use": "bytes_in_use", "memory_peak": "peak_bytes_in_use"}
    told = {name: [each[key] for each in stats if key in each] for name, key in names.items()}
    return {name: max(values) for name, values in told.items() if values}
