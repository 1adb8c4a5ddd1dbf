"""Joules of a step, from a counter that the hardware keeps.

    |- sync, read -|- steps ... sync, read -|- steps ... sync, read -| ... window over -|

Counters move in jumps (about every 100 ms on GPUs, 1 ms with RAPL), so a window must span many of
them: with fewer than 20 changes the reading is called ``insufficient``, not used. Power samples
taken beside it are integrated as a check: on some GPUs the sensor sees a quarter of the time only
(arXiv 2312.02741), and two figures that differ by more than a tenth are both doubtful. Nothing is
ever estimated from a nominal power.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

#: Shortest window, and fewest changes of the counter in it.
WINDOW_S, MIN_UPDATES = 5.0, 20
#: Counter and integrated power may differ by this share of the counter.
MAX_DISAGREEMENT = 0.10
#: The counter is read about this often; steps shorter than it are run several at a time.
POLL_S = 0.03

EnergyStatus = Literal["ok", "insufficient", "disagrees", "unavailable"]


class EnergySource(Protocol):
    """A counter. ``scope`` is what it covers: gpu, module, package, mig_parent."""

    method: str
    scope: str

    def joules(self) -> float:
        """Energy since some fixed moment; never falls."""

    def watts(self) -> float | None:
        """Power now, from a sensor of its own; None where there is none."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why there is no counter."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReading:
    """What was read over a window.

    joules             by the counter; ``power_j`` by integrating power samples
    updates            times the counter was seen to change
    steps              steps run in the window
    idle_w             power before the work, a figure of its own: nothing is subtracted
    """

    status: EnergyStatus
    reason: str = ""
    method: str | None = None
    scope: str | None = None
    joules: float | None = None
    window_s: float | None = None
    updates: int | None = None
    steps: int | None = None
    mean_w: float | None = None
    power_j: float | None = None
    power_samples: int | None = None
    idle_w: float | None = None

    def joules_per_step(self) -> float | None:
        """Joules of one step where the reading can be used and covers this device alone."""
        if self.status != "ok" or not self.steps or self.scope == "mig_parent":
            return None
        return None if self.joules is None else self.joules / self.steps

    def as_record(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_energy(
    step: Callable[[], object],
    source: EnergySource | Unavailable,
    *,
    synchronize: Callable[[], None],
    step_s: float,
    idle_w: float | None = None,
    window_s: float = WINDOW_S,
    min_updates: int = MIN_UPDATES,
    clock: Callable[[], float] = time.perf_counter,
) -> EnergyReading:
    """Repeat ``step`` (about ``step_s`` seconds each) for ``window_s`` and read the counter.

    Any failure of the counter ends as a reading that says so.
    """
    if isinstance(source, Unavailable):
        return EnergyReading(status="unavailable", reason=source.reason)
    per_poll = max(1, int(POLL_S / max(step_s, 1e-6)))
    try:
        return _read(step, source, synchronize, per_poll, idle_w, window_s, min_updates, clock)
    except (OSError, ValueError, CounterError) as error:
        return EnergyReading(status="unavailable", reason=f"{source.method}: {error}")


class CounterError(Exception):
    """The counter could not be read."""


def _read(
    step: Callable[[], object],
    source: EnergySource,
    synchronize: Callable[[], None],
    per_poll: int,
    idle_w: float | None,
    window_s: float,
    min_updates: int,
    clock: Callable[[], float],
) -> EnergyReading:
    synchronize()
    first = last = source.joules()
    start = then = clock()
    steps = updates = power_samples = 0
    power_j, watts = 0.0, source.watts()
    while then - start < window_s:
        for _ in range(per_poll):
            step()
        synchronize()
        steps += per_poll
        joules, now, watts_now = source.joules(), clock(), source.watts()
        updates += joules != last
        if watts is not None and watts_now is not None:
            power_j += (watts + watts_now) / 2 * (now - then)
            power_samples += 1
        last, then, watts = joules, now, watts_now
    elapsed, joules = then - start, last - first
    status: EnergyStatus = "ok"
    reason = ""
    if updates < min_updates:
        status = "insufficient"
        reason = f"the counter changed {updates} times in {elapsed:.2g} s, {min_updates} are needed"
    elif power_samples and abs(power_j - joules) > MAX_DISAGREEMENT * joules:
        status = "disagrees"
        reason = f"counter {joules:.4g} J, integrated power {power_j:.4g} J"
    return EnergyReading(
        status=status,
        reason=reason,
        method=source.method,
        scope=source.scope,
        joules=joules,
        window_s=elapsed,
        updates=updates,
        steps=steps,
        mean_w=joules / elapsed,
        power_j=power_j if power_samples else None,
        power_samples=power_samples,
        idle_w=idle_w,
    )
