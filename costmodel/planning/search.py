"""The fewest replicas that hold, and how much more they would take.

Below the closed-form bound a queue grows without end, however late an objective would notice, so
the search never goes there; and a run whose queue is still long after the last arrival does not
hold.

Percentiles are not monotone in the number of replicas (a router spreads the long prompts
differently each time), so a plan counts only where it holds at n *and* at n + 1. The search gallops
up from the closed-form bound, halves the last interval to find an edge, and then checks both sides
of it.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from costmodel.planning.candidate import Parts
from costmodel.planning.fleet import Outcome, simulate
from costmodel.planning.metrics import Check, Measured, checks, measured
from costmodel.planning.slo import DEFAULT_SHARE
from costmodel.planning.spec import PlanSpec

#: Share of drawn requests that only fill the empty system.
WARM_UP = 0.05
#: Share of the run after which no work may be left over.
BACKLOG = 0.1
#: Rates up to this many times the planned one are tried.
_MOST_LOAD = 16.0
_LOAD_STEPS = 7


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trial:
    """One simulation and its verdict; ``found`` is None when it was stopped early."""

    replicas: int
    outcome: Outcome
    found: Measured | None
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Every objective is met."""
        return self.found is not None and all(c.holds for c in self.checks)

    @property
    def broken(self) -> Check | None:
        """The objective that is broken most."""
        worse = [c for c in self.checks if not c.holds]
        return max(worse, key=lambda c: c.use, default=None)


def backlog(outcome: Outcome, alone_e2e_s: np.ndarray) -> list[Check]:
    """Broken where work is left long after the last arrival: a tenth of the whole run, or three
    times what the longest request takes alone. Percentiles of gaps do not see such a queue.
    """
    last = float(outcome.arrival_s.max())
    span = last - float(outcome.arrival_s.min())
    limit = max(BACKLOG * span, 3.0 * float(alone_e2e_s.max()))
    value = float(outcome.finish_s.max()) - last
    if value <= limit:
        return []
    return [Check(key="backlog_s", value=value, limit=limit, holds=False)]


class Search:
    """Simulations of one candidate, each number of replicas once."""

    def __init__(self, parts: Parts, spec: PlanSpec) -> None:
        self.parts, self.spec = parts, spec
        self.trials: dict[int, Trial] = {}

    @cached_property
    def warm_up(self) -> int:
        """Requests that are not counted; a trace is counted whole."""
        size = self.parts.load.size
        sessions = self.spec.demand.sessions
        if sessions is not None:
            return min(2 * sessions, size // 2)
        return 0 if self.spec.demand.kind == "trace" else int(size * WARM_UP)

    @cached_property
    def _limit(self) -> tuple[np.ndarray | None, float]:
        """(TTFT limit per request, how many may exceed it) that lets a hopeless run stop early."""
        slo, load = self.spec.slo, self.parts.load
        counted = load.size - self.warm_up
        flat = [x for x in slo.limits if x.metric == "ttft"]
        if flat:
            top = max(flat, key=lambda x: x.percentile)
            limit = np.full(load.size, top.limit_s)
            share = top.percentile / 100.0
        elif slo.ttft_s_per_1k_tokens is not None:
            limit, share = slo.scaled_ttft_s(load.input_tokens), slo.attainment or DEFAULT_SHARE
        else:
            return None, np.inf
        limit[: self.warm_up] = np.inf
        return limit, (1.0 - share) * counted + 1.0

    def run(self, replicas: int, *, factor: float = 1.0, whole: bool = False) -> Trial:
        """Simulate ``factor`` times the load. ``whole``: never stop early."""
        outcome = self._simulated(replicas, factor, whole)
        if outcome.aborted:
            return Trial(replicas=replicas, outcome=outcome, found=None, checks=())
        found = measured(outcome, self.parts.load, self.spec.slo, self.warm_up)
        verdict = checks(found, self.spec.slo)
        if self.spec.demand.sessions is None:
            verdict += backlog(outcome, self.parts.alone.e2e_s(self.parts.load.output_tokens))
        return Trial(replicas=replicas, outcome=outcome, found=found, checks=tuple(verdict))

    def _simulated(self, replicas: int, factor: float, whole: bool) -> Outcome:
        load, demand = self.parts.load, self.spec.demand
        sessions = demand.sessions
        if factor != 1.0:
            load = replace(load, arrival_s=load.arrival_s / factor)
            sessions = None if sessions is None else max(1, round(sessions * factor))
        limit, allowed = self._limit
        return simulate(
            load,
            self.parts.steps,
            self.parts.pool,
            replicas * self.parts.candidate.engines_per_replica,
            router=self.spec.grid.router,
            sessions=sessions,
            seed=demand.seed,
            ttft_limit_s=None if whole else limit,
            allowed_late=np.inf if whole else allowed,
        )

    def trial(self, replicas: int) -> Trial:
        """The simulation with so many replicas at the planned load."""
        if replicas not in self.trials:
            self.trials[replicas] = self.run(replicas)
        return self.trials[replicas]

    def holds(self, replicas: int) -> bool:
        """Whether every objective is met."""
        return self.trial(replicas).holds

    def breaks_with_fewer(self, replicas: int) -> str | None:
        """What breaks with one replica fewer; None where that was below the closed form, or was
        not tried.
        """
        trial = self.trials.get(replicas - 1)
        if trial is None or trial.holds:
            return None
        if trial.broken is not None:
            return trial.broken.key
        # Stopped early, for its first tokens alone.
        late = [x for x in self.spec.slo.limits if x.metric == "ttft"]
        return max(late, key=lambda x: x.percentile).key if late else "ttft_per_1k_share"

    def fewest(self, start: int, most: int) -> int | None:
        """Fewest replicas up to ``most`` that hold, with one more too; None when there are none."""
        start = max(1, start)
        low, n, step = start - 1, start, 1
        while not self.holds(n):
            if n >= most:
                return None
            low, n = n, min(most, n + step)
            step *= 2
        high = n
        while high - low > 1:
            middle = (low + high) // 2
            if self.holds(middle):
                high = middle
            else:
                low = middle
        while high <= most:
            if self.holds(high) and self.holds(high + 1):
                return high
            high += 1
        return None

    def most_load(self, replicas: int) -> tuple[float, str | None]:
        """(largest factor on the load that holds, what breaks first above it)."""
        low, high, broken = 1.0, None, None
        factor = 1.25
        while high is None and factor <= _MOST_LOAD:
            trial = self.run(replicas, factor=factor)
            if trial.holds:
                low, factor = factor, factor * 1.5
            else:
                high, broken = factor, trial
        if high is None:
            return low, None
        for _ in range(_LOAD_STEPS - 2):
            if high - low <= 0.02 * low:
                break
            middle = (low + high) / 2
            trial = self.run(replicas, factor=middle)
            if trial.holds:
                low = middle
            else:
                high, broken = middle, trial
        if broken is not None and broken.found is None:
            broken = self.run(replicas, factor=high, whole=True)
        first = broken.broken if broken is not None else None
        return low, None if first is None else first.key
