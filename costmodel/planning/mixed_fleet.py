"""A mix of server types, simulated: each type gets its share of every class of lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from costmodel.planning.candidate import Candidate, Parts, Screened, screen
from costmodel.planning.fleet import Outcome, simulate
from costmodel.planning.metrics import checks, measured
from costmodel.planning.mixed import Floats, Mix, classes_of, subset_of
from costmodel.planning.money import fleet_cost, summed
from costmodel.planning.requests import Requests
from costmodel.planning.rows import filled, money_fields, outcome_fields, pool_of
from costmodel.planning.search import Trial, backlog
from costmodel.planning.spec import PlanSpec

#: Servers added at most while the simulated mix does not hold.
_REPAIRS = 12


def mix_answer(
    types: Sequence[Candidate], mix: Mix, spec: PlanSpec, requests: Requests
) -> dict[str, Any] | None:
    """Simulate a mix and grow it until it holds, with one more of every type too; None if never."""
    owner = _owners(mix, classes_of(requests), spec.demand.seed)
    used = [g for g in range(len(types)) if np.any(owner == g)]
    screened = {g: screen(types[g], spec, subset_of(requests, owner == g)) for g in used}
    parts: dict[int, Parts] = {}
    for g in used:
        found = screened[g].parts
        if found is None:
            return None
        parts[g] = found
    counts = {g: max(1, mix.counts[g]) for g in used}
    for _ in range(_REPAIRS):
        sides = {g: _side(parts[g], counts[g], spec, requests, owner == g) for g in used}
        trial, worst = _verdict(sides, parts, owner, requests, spec)
        if trial.holds:
            more = {g: _side(parts[g], counts[g] + 1, spec, requests, owner == g) for g in used}
            if _verdict(more, parts, owner, requests, spec)[0].holds:
                break
        counts[worst] += 1
        if sum(counts[g] * types[g].gpus_per_replica for g in used) > spec.grid.max_gpus:
            return None
    else:
        return None
    row = _row(types, used, counts, screened, trial, sides, spec)
    for pool, g in zip(row["pools"], used, strict=True):
        lengths = requests.input_tokens[owner == g]
        pool["input_tokens_min"], pool["input_tokens_max"] = int(lengths.min()), int(lengths.max())
        pool["share_of_requests"] = float(np.mean(owner == g))
    return row


def _owners(mix: Mix, classes: Floats, seed: int) -> Floats:
    """Server type of every request: drawn by the shares of its class."""
    drawn = np.random.default_rng(seed).random(classes.size)
    edges = np.cumsum(mix.shares, axis=0)
    owner: Floats = np.zeros(classes.size, dtype=int)
    for b in range(mix.shares.shape[1]):
        mine = classes == b
        top = max(edges[-1, b], 1e-12)
        owner[mine] = np.searchsorted(edges[:, b] / top, drawn[mine], side="right")
    np.minimum(owner, mix.shares.shape[0] - 1, out=owner)
    return owner


def _side(
    parts: Parts, replicas: int, spec: PlanSpec, requests: Requests, chosen: Floats
) -> Outcome:
    load = replace(parts.load, arrival_s=(requests.arrival_s - requests.arrival_s[0])[chosen])
    return simulate(
        load, parts.steps, parts.pool, replicas * parts.candidate.engines_per_replica,
        router=spec.grid.router, seed=spec.demand.seed,
    )  # fmt: skip


def _verdict(
    sides: dict[int, Outcome],
    parts: dict[int, Parts],
    owner: Floats,
    requests: Requests,
    spec: PlanSpec,
) -> tuple[Trial, int]:
    """The whole mix against the objectives, and the type that misses them most."""
    outcome = _joined(sides, owner)
    # Lengths of answers may differ by method, so the load is put together by owner.
    first = next(iter(parts.values())).load
    columns = {}
    for name in ("input_tokens", "output_tokens", "drain_s"):
        column = np.zeros(owner.size)
        for g, p in parts.items():
            column[owner == g] = getattr(p.load, name)
        columns[name] = column
    whole = replace(first, **columns)
    found = measured(outcome, whole, spec.slo)
    alone = max(float(p.alone.e2e_s(p.load.output_tokens).max()) for p in parts.values())
    verdict = (*checks(found, spec.slo), *backlog(outcome, np.array([alone])))
    worst, most = next(iter(sides)), -1.0
    for g, side in sides.items():
        mine = checks(measured(side, parts[g].load, spec.slo), spec.slo)
        mine += backlog(side, parts[g].alone.e2e_s(parts[g].load.output_tokens))
        use = max((c.use for c in mine), default=0.0)
        if use > most:
            worst, most = g, use
    replicas = sum(side.replicas for side in sides.values())
    return Trial(replicas=replicas, outcome=outcome, found=found, checks=verdict), worst


def _joined(sides: dict[int, Outcome], owner: Floats) -> Outcome:
    """One outcome of all groups; replicas numbered through."""
    n = owner.size
    arrays = {k: np.zeros(n) for k in ("arrival_s", "first_s", "finish_s")}
    replica = np.zeros(n, dtype=int)
    gaps: list[list[Floats]] = [[], [], [], [], []]
    starts, stalled, stall_s = [], [], []
    shift = count = 0
    for g, side in sides.items():
        index = np.flatnonzero(owner == g)
        for name, array in arrays.items():
            array[index] = getattr(side, name)
        replica[index] = side.replica + count
        starts.append(side.gap_replica + shift)
        stalled.append(index[side.stalls[0]])
        stall_s.append(side.stalls[1])
        for column, more in zip(gaps, side.gaps, strict=True):
            column.append(more)
        shift += side.gaps[0].size
        count += side.replicas
    span = float(arrays["finish_s"].max() - arrays["arrival_s"].min())
    columns = [np.concatenate(c) for c in gaps]
    return Outcome(
        arrival_s=arrays["arrival_s"],
        first_s=arrays["first_s"],
        finish_s=arrays["finish_s"],
        replica=replica,
        gaps=(columns[0], columns[1], columns[2], columns[3], columns[4]),
        gap_replica=np.concatenate(starts),
        stalls=(np.concatenate(stalled), np.concatenate(stall_s)),
        n_preempted=sum(s.n_preempted for s in sides.values()),
        prefill_s=sum(s.prefill_s for s in sides.values()),
        decode_s=sum(s.decode_s for s in sides.values()),
        span_s=span,
        kv_occupancy=float(np.average([s.kv_occupancy for s in sides.values()],
                                      weights=[s.replicas for s in sides.values()])),
        peak_occupancy=max(s.peak_occupancy for s in sides.values()),
        replicas=count,
    )  # fmt: skip


def _row(
    types: Sequence[Candidate],
    used: Sequence[int],
    counts: Mapping[int, int],
    screened: Mapping[int, Screened],
    trial: Trial,
    sides: Mapping[int, Outcome],
    spec: PlanSpec,
) -> dict[str, Any]:
    names = [screened[g].names for g in used]
    lost = [x for g in used if (x := screened[g].given_up) is not None]
    worst = max(lost, key=lambda x: np.inf if x.drop_points is None else x.drop_points)
    specs = list(dict.fromkeys(n["method_spec"] for n in names))
    costs, dates, bases = [], [], []
    for g in used:
        parts = screened[g].parts
        assert parts is not None
        dates.append(parts.hardware.price_date)
        bases.append(parts.steps.basis)
        side = replace(sides[g], span_s=trial.outcome.span_s)
        per = types[g].gpus_per_replica // types[g].engines_per_replica
        costs.append(fleet_cost(parts.hardware, side, per, spec.money))
    cost = summed(costs)
    pools = [pool_of(screened[g], "both", counts[g]) for g in used]
    row = {
        "reason": None, "model": names[0]["model"],
        "method": names[0]["method"] if len(specs) == 1 else "mixed",
        "method_spec": specs[0] if len(specs) == 1 else " | ".join(specs),
        "level": types[used[0]].level, "engine": names[0]["engine"],
        "gpu": " + ".join(n["gpu"] for n in names), "tp": max(types[g].tp for g in used),
        "replicas": sum(counts.values()), "gpus": sum(p["gpus"] for p in pools), "pools": pools,
        "binds": "mix", "accuracy_drop_points": worst.drop_points,
        "accuracy_source": worst.source, "accuracy_analogy": worst.analogy,
        "price_date": max(dates) or None, "basis": bases[0],
        **outcome_fields(trial, spec), **money_fields(cost, trial),
    }  # fmt: skip
    return filled(row)
