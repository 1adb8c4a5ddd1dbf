"""What runs in a worker process: one candidate at a time, by name.

The plan and its requests travel once per process (``set_context``); tasks carry only candidates. A
task builds what it needs again if another process screened the candidate: that takes well under the
time of one simulation, and a task lost with its process can run anywhere else.
"""

from collections import OrderedDict
from math import isfinite
from typing import Any

from costmodel.planning.candidate import Candidate, Screened, screen
from costmodel.planning.requests import Requests
from costmodel.planning.rows import bound_row, simulated_row
from costmodel.planning.search import Search
from costmodel.planning.sensitivity import Scenario, needed_replicas
from costmodel.planning.spec import PlanSpec

#: Screened candidates that a process keeps; with a million requests each holds about 100 MB.
_KEPT_BYTES = 400e6


class _Context:
    def __init__(self) -> None:
        self.spec: PlanSpec | None = None
        self.requests: Requests | None = None
        self.searches: OrderedDict[Candidate, tuple[Screened, Search | None]] = OrderedDict()


_CONTEXT = _Context()


def set_context(spec: PlanSpec, requests: Requests) -> None:
    """Give this process its plan."""
    _CONTEXT.spec, _CONTEXT.requests = spec, requests
    _CONTEXT.searches.clear()


def _plan() -> tuple[PlanSpec, Requests]:
    if _CONTEXT.spec is None or _CONTEXT.requests is None:
        raise AssertionError("the worker was started without its plan")
    return _CONTEXT.spec, _CONTEXT.requests


def _search(candidate: Candidate) -> tuple[Screened, Search | None]:
    spec, requests = _plan()
    kept = _CONTEXT.searches
    if candidate not in kept:
        screened = screen(candidate, spec, requests)
        search = None if screened.parts is None else Search(screened.parts, spec)
        kept[candidate] = (screened, search)
        most = max(1, int(_KEPT_BYTES / (100.0 * requests.size)))
        while len(kept) > most:
            kept.popitem(last=False)
    return kept[candidate]


def screen_task(candidate: Candidate) -> dict[str, Any]:
    """The row before any simulation; feasible so far where ``reason`` is None."""
    screened, _ = _search(candidate)
    return bound_row(screened)


def answer_task(candidate: Candidate) -> dict[str, Any]:
    """The row with the fewest replicas that hold; else the largest fleet, and what it misses."""
    spec, _ = _plan()
    screened, search = _search(candidate)
    assert search is not None
    per_replica = candidate.gpus_per_replica
    most = spec.grid.max_gpus // per_replica
    start = min(screened.bound_replicas or 1, most)
    replicas = search.fewest(start, most)
    if replicas is not None:
        return simulated_row(screened, search, search.trial(replicas), spec)
    trial = search.trial(most)
    if trial.found is None or trial.holds:
        trial = search.run(most, whole=True)
    row = simulated_row(screened, search, trial, spec)
    row["feasible"] = False
    row["miss"] = max((c.use for c in trial.checks), default=None)
    row["reason"] = _misses(row, most * per_replica)
    return row


def _misses(row: dict[str, Any], gpus: int) -> str:
    late = [c for c in row["checks"] if not c["holds"]]
    if not late:
        return f"holds with {gpus} GPUs, but not with one replica more or less: not dependable"
    parts = [
        f"{c['key'].removesuffix('_s')} is {c['value']:.3g} (limit {c['limit']:.3g})" for c in late
    ]
    return f"with all {gpus} GPUs allowed: {', '.join(parts)}"


def headroom_task(candidate: Candidate, replicas: int) -> dict[str, Any]:
    """How much more load the plan holds, and what breaks first."""
    _, requests = _plan()
    _, search = _search(candidate)
    assert search is not None
    factor, first = search.most_load(replicas)
    rate = requests.rate_per_s
    return {
        "headroom": factor - 1.0,
        "max_rate_per_s": rate * factor if isfinite(rate) else None,
        "breaks_first": first,
    }


def sensitivity_task(candidate: Candidate, scenarios: tuple[Scenario, ...]) -> dict[str, float]:
    """Replicas (a fraction) that each scenario needs in closed form."""
    spec, requests = _plan()
    return {s.name: needed_replicas(candidate, spec, requests, s) for s in scenarios}


def curve_task(
    candidate: Candidate, replicas: int, factors: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Latency against rate, for the picture: whole simulations at fractions of the load."""
    _, search = _search(candidate)
    assert search is not None
    out = []
    for factor in factors:
        found = search.run(replicas, factor=factor, whole=True).found
        assert found is not None
        out.append(
            {
                "factor": factor,
                **{
                    f"{m}_p{p}_s": found.percentile(m, p)
                    for m, p in (("ttft", 50), ("ttft", 99), ("tpot", 95), ("itl", 95), ("e2e", 99))
                },
            }
        )
    return out
