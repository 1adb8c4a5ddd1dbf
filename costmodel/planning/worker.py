"""What runs in a worker process: one candidate at a time, by name.

The plan and its requests travel once per process (``set_context``); tasks carry only candidates. A
task builds what it needs again if another process screened the candidate: that takes well under the
time of one simulation, and a task lost with its process can run anywhere else.
"""

from collections import OrderedDict
from math import isfinite
from typing import Any

from costmodel.planning.candidate import Candidate, Screened, screen
from costmodel.planning.disaggregated import (
    Pair,
    PairSearch,
    ScreenedPair,
    screen_pair,
)
from costmodel.planning.mixed import Mix, class_rates
from costmodel.planning.mixed_fleet import mix_answer
from costmodel.planning.pair_rows import pair_bound_row, pair_row
from costmodel.planning.requests import Requests
from costmodel.planning.rows import bound_row, simulated_row
from costmodel.planning.search import Search, Trial
from costmodel.planning.sensitivity import Scenario, needed_replicas
from costmodel.planning.spec import PlanSpec

#: What the curve of latency against rate always has.
_CURVES = (("ttft", 50.0), ("ttft", 99.0), ("tpot", 95.0), ("itl", 95.0), ("e2e", 99.0))
#: Screened candidates that a process keeps; with a million requests each holds about 100 MB.
_KEPT_BYTES = 400e6


class _Context:
    def __init__(self) -> None:
        self.spec: PlanSpec | None = None
        self.requests: Requests | None = None
        self.searches: OrderedDict[
            Candidate | Pair, tuple[Screened | ScreenedPair, Search | None]
        ] = OrderedDict()


_CONTEXT = _Context()


def set_context(spec: PlanSpec, requests: Requests) -> None:
    """Give this process its plan."""
    _CONTEXT.spec, _CONTEXT.requests = spec, requests
    _CONTEXT.searches.clear()


def _plan() -> tuple[PlanSpec, Requests]:
    if _CONTEXT.spec is None or _CONTEXT.requests is None:
        raise AssertionError("the worker was started without its plan")
    return _CONTEXT.spec, _CONTEXT.requests


def _search(candidate: Candidate | Pair) -> tuple[Screened | ScreenedPair, Search | None]:
    spec, requests = _plan()
    kept = _CONTEXT.searches
    if candidate not in kept:
        search: Search | None = None
        screened: Screened | ScreenedPair
        if isinstance(candidate, Pair):
            screened = screen_pair(candidate, spec, requests)
            search = None if screened.parts is None else PairSearch(screened, spec)
        else:
            screened = screen(candidate, spec, requests)
            search = None if screened.parts is None else Search(screened.parts, spec)
        kept[candidate] = (screened, search)
        most = max(1, int(_KEPT_BYTES / (100.0 * requests.size)))
        while len(kept) > most:
            kept.popitem(last=False)
    return kept[candidate]


def screen_task(candidate: Candidate | Pair) -> dict[str, Any]:
    """The row before any simulation; feasible so far where ``reason`` is None."""
    screened, _ = _search(candidate)
    if isinstance(screened, ScreenedPair):
        return pair_bound_row(screened, _plan()[1].rate_per_s)
    return bound_row(screened)


def answer_task(candidate: Candidate | Pair) -> dict[str, Any]:
    """The row with the fewest replicas that hold; else the largest fleet, and what it misses."""
    spec, requests = _plan()
    screened, search = _search(candidate)
    if isinstance(screened, ScreenedPair):
        assert isinstance(search, PairSearch)
        return _pair_answer(screened, search, spec, requests)
    assert search is not None
    per_replica = screened.candidate.gpus_per_replica
    most = spec.grid.max_gpus // per_replica
    start = min(screened.bound_replicas or 1, most)
    replicas = search.fewest(start, most)
    if replicas is not None:
        return simulated_row(screened, search, search.trial(replicas), spec)
    trial = search.trial(most)
    if trial.found is None or trial.holds:
        trial = search.run(most, whole=True)
    return _missed(simulated_row(screened, search, trial, spec), trial, most * per_replica)


def _pair_answer(
    screened: ScreenedPair, search: PairSearch, spec: PlanSpec, requests: Requests
) -> dict[str, Any]:
    start = screened.bounds(requests.rate_per_s)
    found = search.fewest_pair(start, spec.grid.max_gpus)
    if found is None:
        row = pair_bound_row(screened, requests.rate_per_s)
        row["reason"] = f"no split of {spec.grid.max_gpus} GPUs over both pools holds"
        return row
    return pair_row(search, search.trial(found[1]), spec)


def _missed(row: dict[str, Any], trial: Trial, gpus: int) -> dict[str, Any]:
    row["feasible"] = False
    row["miss"] = max((c.use for c in trial.checks), default=None)
    row["reason"] = _misses(row, gpus)
    return row


def _misses(row: dict[str, Any], gpus: int) -> str:
    late = [c for c in row["checks"] if not c["holds"]]
    if not late:
        return f"holds with {gpus} GPUs, but not with one replica more or less: not dependable"
    parts = [
        f"{c['key'].removesuffix('_s')} is {c['value']:.3g} (limit {c['limit']:.3g})" for c in late
    ]
    return f"with all {gpus} GPUs allowed: {', '.join(parts)}"


def headroom_task(candidate: Candidate | Pair, pools: list[dict[str, Any]]) -> dict[str, Any]:
    """How much more load the plan holds, and what breaks first."""
    _, requests = _plan()
    search, replicas = _placed(candidate, pools)
    factor, first = search.most_load(replicas)
    rate = requests.rate_per_s
    return {
        "headroom": factor - 1.0,
        "max_rate_per_s": rate * factor if isfinite(rate) else None,
        "breaks_first": first,
    }


def _placed(candidate: Candidate | Pair, pools: list[dict[str, Any]]) -> tuple[Search, int]:
    """The search of a plan with its pools set, and the replicas of the pool it varies."""
    _, search = _search(candidate)
    assert search is not None
    if isinstance(search, PairSearch):
        search.set_prefill(pools[0]["replicas"])
    return search, pools[-1]["replicas"]


def sensitivity_task(
    candidate: Candidate | Pair, scenarios: tuple[Scenario, ...]
) -> dict[str, float]:
    """Replicas (a fraction) that each scenario needs in closed form."""
    spec, requests = _plan()
    return {s.name: needed_replicas(candidate, spec, requests, s) for s in scenarios}


def curve_task(
    candidate: Candidate | Pair, pools: list[dict[str, Any]], factors: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Latency against rate, for the picture: whole simulations at fractions of the load."""
    search, replicas = _placed(candidate, pools)
    asked = [(x.metric, x.percentile) for x in _plan()[0].slo.limits]
    drawn = dict.fromkeys((*_CURVES, *asked))
    out = []
    for factor in factors:
        found = search.run(replicas, factor=factor, whole=True).found
        assert found is not None
        out.append(
            {
                "factor": factor,
                **{f"{m}_p{p:g}_s": found.percentile(m, p) for m, p in drawn},
            }
        )
    return out


def class_task(candidate: Candidate) -> list[float]:
    """Closed-form rate of one server for every class of lengths."""
    return class_rates(candidate, *_plan())


def mix_task(types: tuple[Candidate, ...], mix: Mix) -> dict[str, Any] | None:
    """A mix, simulated and grown until it holds."""
    return mix_answer(types, mix, *_plan())
