"""Rows of plans with separate prefill and decode pools."""

from dataclasses import replace
from typing import Any

import numpy as np

from costmodel.planning.disaggregated import PairSearch, ScreenedPair
from costmodel.planning.money import fleet_cost, rent_usd_per_hour, summed
from costmodel.planning.rows import filled, money_fields, outcome_fields, pool_of
from costmodel.planning.search import Trial
from costmodel.planning.spec import PlanSpec


def _names(screened: ScreenedPair) -> dict[str, Any]:
    c, d = screened.pair.prefill, screened.pair.decode
    lost = screened.prefill.given_up
    return {
        "feasible": False,
        "reason": screened.reason,
        "model": c.model,
        "method": c.method,
        "method_spec": c.method,
        "level": c.level,
        "engine": c.engine,
        "tp": d.tp,
        **screened.prefill.names,
        "gpu": f"{c.gpu} > {d.gpu}",
        "pools": [],
        "answered_by": "bound",
        "accuracy_drop_points": None if lost is None else lost.drop_points,
        "accuracy_source": None if lost is None else lost.source,
        "accuracy_analogy": None if lost is None else lost.analogy,
    }


def _rent(screened: ScreenedPair, n: int, m: int) -> float | None:
    assert screened.parts is not None
    pair = screened.pair
    sides = (
        (screened.parts.prefill.hardware, n * pair.prefill.gpus_per_replica),
        (screened.parts.decode.hardware, m * pair.decode.gpus_per_replica),
    )
    usd = [rent_usd_per_hour(hardware, gpus) for hardware, gpus in sides]
    return None if None in usd else sum(x[1] for x in usd if x is not None)


def pair_bound_row(screened: ScreenedPair, rate: float) -> dict[str, Any]:
    """The row before any simulation."""
    row = _names(screened)
    if screened.parts is not None:
        n, m = screened.bounds(rate)
        pair = screened.pair
        row |= {
            "miss": screened.miss,
            "bound_replicas": n + m,
            "bound_gpus": n * pair.prefill.gpus_per_replica + m * pair.decode.gpus_per_replica,
            "bound_usd_per_hour": _rent(screened, n, m),
        }
    return filled(row)


def pair_row(search: PairSearch, trial: Trial, spec: PlanSpec) -> dict[str, Any]:
    """The row of both pools."""
    screened, both = search.screened, search.both
    n, m = search.n_prefill, trial.replicas
    pair = screened.pair
    first, second = search.outcomes[trial.replicas]
    row = _names(screened) | outcome_fields(trial, spec)
    bounds = screened.bounds(search.rate_per_s)
    span = trial.outcome.span_s
    costs = [
        fleet_cost(parts.hardware, replace(side, span_s=span), per, spec.money)
        for parts, side, per in (
            (both.prefill, first, pair.prefill.gpus_per_replica),
            (both.decode, second, pair.decode.gpus_per_replica),
        )
        if side is not None
    ]
    row |= {
        "replicas": n + m,
        "gpus": n * pair.prefill.gpus_per_replica + m * pair.decode.gpus_per_replica,
        "pools": [
            pool_of(screened.prefill, "prefill", n),
            pool_of(screened.decode, "decode", m),
        ],
        "binds": "prefill pool" if n > m else "decode pool",
        "holds": {f"{a}+{b}": True for a, b in ((n, m), (n, m + 1), (n + 1, m))},
        "bound_replicas": sum(bounds),
        "bound_gap": (n + m) / sum(bounds),
        "transfer_p50_s": float(np.median(both.transfer_s)),
        "transfer_p99_s": float(np.percentile(both.transfer_s, 99)),
        "price_date": both.prefill.hardware.price_date or None,
        "basis": both.prefill.steps.basis,
    }
    return filled(row | money_fields(summed(costs), trial))
