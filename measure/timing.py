"""How one thing is timed.

    |- warm-up: >= 2 calls, until the last 3 agree within 5 % or a second has passed -|
    |- sample, sample, ... until the median is known to 2 % or the budget is spent -------------|

Between samples the caller may put things back (``before``); that is not timed. On a CPU with one
thread the clock is the thread's own CPU time, which a busy neighbour hardly moves (median over runs
2.8 % against 5.6 % for the wall clock, measured under more than one core of foreign load); with
several threads it is the wall clock, and blocks in which others used the machine are repeated. A
GPU's calls are timed by its own events (a :class:`Stopwatch`), and until the host was free again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from measure.load import ForeignLoad
from measure.statistics import Statistics, summarise


class Clock(Protocol):
    """Anything that reads seconds."""

    def __call__(self) -> float:
        """Seconds since some fixed moment."""


class Stopwatch(Protocol):
    """Times one call another way than by reading a clock before and after."""

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds the call took on the device, and until it returned to the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When to stop sampling.

    Sampling ends at ``max_samples``, or once ``min_samples`` are there and either the half-width
    of the median's interval is within ``precision`` or ``seconds`` have passed. When the budget is
    spent ``least_samples`` suffice.
    """

    seconds: float = 3.0
    min_samples: int = 7
    least_samples: int = 3
    max_samples: int = 200
    precision: float = 0.02
    min_warmups: int = 2
    max_warmups: int = 20
    warmup_seconds: float = 1.0


#: The same number of calls whatever they take: several processes that wait for each other in every
#: call must make equally many.
FIXED_BUDGET = Budget(
    seconds=float("inf"),
    min_samples=7,
    max_samples=7,
    min_warmups=2,
    max_warmups=2,
    warmup_seconds=float("inf"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Samples of one thing with how they were taken.

    first_call_s   the very first call: allocation, caches and tables being built
    gated          blocks repeated because others used the machine
    forced         blocks kept although they did
    host_samples   with a stopwatch: seconds until each call returned to the host
    """

    samples: tuple[float, ...]
    statistics: Statistics
    timer: str
    first_call_s: float
    warmups: int
    gated: int = 0
    forced: int = 0
    host_samples: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Times calls with a clock; ``load`` is given where the clock is the wall's.

    ``wall`` paces the budget; ``clock`` takes the samples, or ``stopwatch`` where there is one.
    """

    name: str
    clock: Clock
    stopwatch: Stopwatch | None = None
    wall: Clock = time.perf_counter
    load: ForeignLoad | None = None
    #: foreign use of the machine, in cores, that a block of samples may see, and its length: the
    #: kernel counts in ticks of 10 ms, so shorter blocks say nothing
    max_foreign_cores: float = 0.08
    block_s: float = 0.15
    max_retries: int = 5
    pause_s: float = 0.3
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def for_cpu(cls, threads: int) -> "Sampler":
        """Choose the clock for a number of compute threads."""
        if threads == 1:
            return cls(name="thread_time", clock=time.thread_time)
        return cls(name="wall_gated", clock=time.perf_counter, load=ForeignLoad())

    def time(
        self,
        call: Callable[[], object],
        *,
        before: Callable[[], object] | None = None,
        budget: Budget | None = None,
    ) -> Timing:
        """Warm up, then sample until the budget says stop."""
        budget = budget or Budget()
        warm = self._warm_up(call, before, budget)
        samples: list[float] = []
        host: list[float] = []
        gated = forced = 0
        start = self.wall()
        while not _enough(samples, self.wall() - start, budget):
            block, retries, kept_anyway = self._block(call, before, host)
            samples += block
            gated += retries
            forced += kept_anyway
        return Timing(
            samples=tuple(samples),
            statistics=summarise(samples),
            timer=self.name,
            first_call_s=warm[0],
            warmups=len(warm),
            gated=gated,
            forced=forced,
            host_samples=tuple(host),
        )

    def _warm_up(
        self, call: Callable[[], object], before: Callable[[], object] | None, budget: Budget
    ) -> list[float]:
        warm: list[float] = []
        start = self.wall()
        while len(warm) < max(1, budget.max_warmups):
            warm.append(self._sample(call, before))
            settled = len(warm) >= 3 and max(warm[-3:]) <= 1.05 * min(warm[-3:])
            spent = self.wall() - start >= budget.warmup_seconds
            if len(warm) >= budget.min_warmups and (settled or spent):
                break
            if warm[-1] >= budget.warmup_seconds:  # a call this long warms everything it uses
                break
        return warm

    def _block(
        self,
        call: Callable[[], object],
        before: Callable[[], object] | None,
        host: list[float],
    ) -> tuple[list[float], int, bool]:
        """Take (samples, times repeated, kept although disturbed): the least disturbed try."""
        if self.load is None:
            return [self._sample(call, before, host)], 0, False
        tries: list[tuple[float, list[float]]] = []
        for _ in range(self.max_retries + 1):
            if tries:
                self.sleep(self.pause_s)
            self.load.start()
            start, samples = self.wall(), [self._sample(call, before)]
            while self.wall() - start < self.block_s:
                samples.append(self._sample(call, before))
            foreign = self.load.foreign_cores()
            tries.append((foreign, samples))
            if foreign <= self.max_foreign_cores:
                return samples, len(tries) - 1, False
        return min(tries)[1], len(tries) - 1, True

    def _sample(
        self,
        call: Callable[[], object],
        before: Callable[[], object] | None,
        host: list[float] | None = None,
    ) -> float:
        if before is not None:
            before()
        if self.stopwatch is not None:
            seconds, host_s = self.stopwatch(call)
            if host is not None:
                host.append(host_s)
            return seconds
        start = self.clock()
        call()
        return self.clock() - start


def _enough(samples: list[float], elapsed_s: float, budget: Budget) -> bool:
    n = len(samples)
    if n >= budget.max_samples:
        return True
    if elapsed_s >= budget.seconds and n >= budget.least_samples:
        return True
    if n < budget.min_samples:
        return False
    return summarise(samples).half_width_fraction <= budget.precision
