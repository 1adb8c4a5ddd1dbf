"""Requests through a router to replicas, in the order of time; deterministic by seed."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np

from costmodel.planning.load import Load
from costmodel.planning.replica import Replica
from costmodel.planning.steps import StepTable
from costmodel.planning.work import Work

#: Requests between two looks at whether the objectives can still be met.
_LOOK_EVERY = 256


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Outcome:
    """What a simulation left behind. Arrays run over requests.

    gaps         (starts, first, growth, iterations, sequences) per event: iterations follow each
                 other from ``starts`` and take first, first + growth, ...
    stalls       (request, seconds) of gaps across preemptions
    gap_replica  first gap of each replica in ``gaps``
    decoding_s   from when a request's gaps are those of its replica; None: from its first token
    aborted      it was stopped because the objectives could no longer be met
    """

    arrival_s: np.ndarray
    first_s: np.ndarray
    finish_s: np.ndarray
    replica: np.ndarray
    gaps: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    gap_replica: np.ndarray
    stalls: tuple[np.ndarray, np.ndarray]
    n_preempted: int
    prefill_s: float
    decode_s: float
    span_s: float
    kv_occupancy: float
    peak_occupancy: float
    replicas: int
    decoding_s: np.ndarray | None = None
    aborted: bool = False


def simulate(
    load: Load,
    steps: StepTable,
    pool: float,
    replicas: int,
    *,
    router: str = "least_requests",
    sessions: int | None = None,
    seed: int = 0,
    ttft_limit_s: np.ndarray | None = None,
    allowed_late: float = inf,
    started_s: np.ndarray | None = None,
) -> Outcome:
    """Run every request to its end.

    ``sessions`` closes the loop: that many requests at once, each answer brings the next, and
    ``load.arrival_s`` is not used. More than ``allowed_late`` requests above their ``ttft_limit_s``
    stop the run early (``aborted``). ``started_s``: prompts were computed elsewhere, where the
    first tokens came out at these times; ``load.arrival_s`` is when their state arrives here.
    """
    work = Work(load, ttft_limit_s, started_s)
    fleet = [Replica(steps, pool, work) for _ in range(replicas)]
    run = _Run(work, fleet, _router(router, fleet, seed), allowed_late)
    done = run.closed(sessions) if sessions else run.open()
    return _outcome(run, pool, aborted=not done)


class _Run:
    """The clock: arrivals and the ends of the replicas' events, whichever is first."""

    def __init__(
        self, work: Work, fleet: list[Replica], route: Callable[[int], int], allowed_late: float
    ) -> None:
        self.work, self.fleet, self.route = work, fleet, route
        self.allowed_late = allowed_late
        self.events: list[tuple[float, int, int]] = []
        self.replica = [0] * len(work.arrival)

    def open(self) -> bool:
        """Arrivals as given; False when stopped early."""
        events, fleet, work = self.events, self.fleet, self.work
        for i, now in enumerate(work.arrival):
            while events and events[0][0] < now:
                end, j, stamp = heappop(events)
                replica = fleet[j]
                if replica.stamp == stamp and replica.end == end:
                    replica.advance()
                    if replica.end < inf:
                        heappush(events, (replica.end, j, replica.stamp))
            self._send(i, now)
            if i % _LOOK_EVERY == 0 and self._hopeless(now):
                return False
        count = 0
        while events:
            now, j, stamp = heappop(events)
            replica = fleet[j]
            if replica.stamp == stamp and replica.end == now:
                replica.advance()
                if replica.end < inf:
                    heappush(events, (replica.end, j, replica.stamp))
            count += 1
            if count % _LOOK_EVERY == 0 and self._hopeless(now):
                return False
        return work.n_late <= self.allowed_late

    def closed(self, sessions: int) -> bool:
        """The next request comes when one is answered."""
        events, fleet, work = self.events, self.fleet, self.work
        total = len(work.arrival)
        sent = min(sessions, total)
        work.arrival[:sent] = [0.0] * sent
        for i in range(sent):
            self._send(i, 0.0)
        while events:
            now, j, stamp = heappop(events)
            replica = fleet[j]
            if replica.stamp != stamp or replica.end != now:
                continue
            answered = replica.settle()
            for _ in range(min(answered, total - sent)):
                work.arrival[sent] = now
                self._send(sent, now)
                sent += 1
            replica.start(now)
            if replica.end < inf:
                heappush(events, (replica.end, j, replica.stamp))
            if work.n_late > self.allowed_late:
                return False
        return True

    def _send(self, i: int, now: float) -> None:
        j = self.route(i)
        self.replica[i] = j
        replica = self.fleet[j]
        if replica.enqueue(i, now):
            heappush(self.events, (replica.end, j, replica.stamp))

    def _hopeless(self, now: float) -> bool:
        """Too many are late already, those still waiting counted."""
        if self.allowed_late == inf:
            return False
        work, late = self.work, self.work.n_late
        for replica in self.fleet:
            for i in replica.waiting:
                if now - work.arrival[i] <= work.ttft_limit[i]:
                    break
                late += work.generated[i] == 0
            if late > self.allowed_late:
                return True
        return False


def _router(name: str, fleet: list[Replica], seed: int) -> Callable[[int], int]:
    """Which replica gets request i."""
    n = len(fleet)
    if name == "round_robin" or n == 1:
        return lambda i: i % n
    if name == "random":
        drawn = np.random.default_rng(seed).integers(0, n, 1 << 16).tolist()
        return lambda i: drawn[i & 0xFFFF]

    def least(i: int) -> int:
        loads = [replica.outstanding for replica in fleet]
        return loads.index(min(loads))

    return least


def _outcome(run: _Run, pool: float, *, aborted: bool) -> Outcome:
    work, fleet = run.work, run.fleet
    columns = [
        np.concatenate([np.frombuffer(getattr(r, name), dtype=np.float64) for r in fleet])
        for name in ("gap_starts", "first_gap_s", "gap_slope")
    ]
    counts = np.concatenate([np.frombuffer(r.gap_counts, dtype=np.int64) for r in fleet])
    sizes = [len(r.gap_starts) for r in fleet]
    arrival = np.array(work.arrival)
    finish = np.array(work.finish_s)
    span = 0.0 if aborted else float(finish.max() - arrival.min())
    held = sum(r.held_byte_s for r in fleet)
    stalls = np.array(work.stalls, dtype=np.float64).reshape(-1, 2)
    return Outcome(
        arrival_s=arrival,
        first_s=np.array(work.first_s),
        finish_s=finish,
        replica=np.array(run.replica),
        gaps=(columns[0], columns[1], columns[2], counts[0::2], counts[1::2]),
        gap_replica=np.concatenate(([0], np.cumsum(sizes)[:-1])),
        stalls=(stalls[:, 0].astype(np.int64), stalls[:, 1]),
        n_preempted=sum(r.n_preempted for r in fleet),
        prefill_s=sum(r.prefill_s for r in fleet),
        decode_s=sum(r.decode_s for r in fleet),
        span_s=span,
        kv_occupancy=held / (pool * span * len(fleet)) if span else 0.0,
        peak_occupancy=max(r.peak_bytes for r in fleet) / pool,
        replicas=len(fleet),
        aborted=aborted,
    )
