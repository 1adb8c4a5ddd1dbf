"""The row of one candidate, with the keys of the contract; unknown is None."""

from typing import Any

from costmodel.planning.candidate import Screened
from costmodel.planning.metrics import goodput_rps, intervals, percentiles
from costmodel.planning.money import fleet_cost, rent_usd_per_hour
from costmodel.planning.search import Search, Trial
from costmodel.planning.spec import PlanSpec

#: Keys of a row, in order.
KEYS = (
    "rank", "feasible", "reason", "model", "method", "method_spec", "level", "engine", "gpu", "tp",
    "replicas", "gpus", "pools", "usd_per_hour", "usd_per_hour_low", "usd_per_hour_high",
    "usd_per_million_tokens", "usd_per_million_input_tokens", "usd_per_million_output_tokens",
    "energy_j_per_token", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p95_s", "itl_p95_s",
    "itl_p99_s", "e2e_p99_s", "intervals", "goodput_rps", "throughput_rps", "output_tokens_per_s",
    "kv_occupancy", "kv_peak", "largest_share",
    "n_preempted", "headroom", "max_rate_per_s", "breaks_first", "binds",
    "binding", "checks", "fragile", "accuracy_drop_points", "accuracy_source", "accuracy_analogy",
    "bound_replicas", "bound_gap", "holds", "answered_by", "price_date", "basis",
)  # fmt: skip


def _base(screened: Screened) -> dict[str, Any]:
    c = screened.candidate
    row: dict[str, Any] = {
        "feasible": False,
        "reason": screened.reason,
        "model": c.model,
        "method": c.method,
        "method_spec": c.method,
        "level": c.level,
        "engine": c.engine,
        "gpu": c.gpu,
        "tp": c.tp,
        "pools": [],
        "answered_by": "bound",
        **screened.names,
    }
    lost = screened.given_up
    if lost is not None:
        row["accuracy_drop_points"] = lost.drop_points
        row["accuracy_source"] = lost.source
        row["accuracy_analogy"] = lost.analogy
    return row


def _pools(screened: Screened, row: dict[str, Any], replicas: int) -> list[dict[str, Any]]:
    c = screened.candidate
    return [
        {
            "role": "both", "model": row["model"], "method": row["method_spec"], "gpu": row["gpu"],
            "tp": c.tp, "pp": c.pp, "ep": c.ep, "cp": c.cp, "replicas": replicas,
        }
    ]  # fmt: skip


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    return {k: row.get(k) for k in (*KEYS, *(k for k in row if k not in KEYS))}


def bound_row(screened: Screened, reason: str | None = None) -> dict[str, Any]:
    """A row answered without a simulation: infeasible, or beaten by its own bound."""
    row = _base(screened)
    row["reason"] = reason or screened.reason
    if screened.parts is not None and screened.bound_replicas is not None:
        replicas = screened.bound_replicas
        gpus = replicas * screened.candidate.gpus_per_replica
        usd = rent_usd_per_hour(screened.parts.hardware, gpus)
        row |= {
            "bound_replicas": replicas,
            "binding": binding(screened),
            "binds": binds(screened),
            "price_date": screened.parts.hardware.price_date or None,
        }
        if usd is not None:
            row |= {"bound_usd_per_hour": usd[1]}
    return _filled(row)


def binding(screened: Screened) -> dict[str, float]:
    """Seconds of one replica that a request takes, by what it takes them for."""
    assert screened.parts is not None
    bound = screened.parts.bound
    return {
        "prefill_s": bound.prefill_s,
        "decode_s": bound.decode_s,
        "kv_pool_s": bound.kv_s,
        "batch": bound.batch,
        "max_rate_per_replica_per_s": bound.rate_per_s,
        "kv_pool_bytes": screened.parts.pool,
        "weights_bytes": screened.parts.model.run.weights_bytes,
        "usable_bytes": screened.parts.hardware.memory_bytes
        * screened.parts.model.options.memory_fraction,
    }


def binds(screened: Screened) -> str:
    """What limits a replica's rate in closed form."""
    assert screened.parts is not None
    bound = screened.parts.bound
    if bound.memory_binds and bound.kv_s > 0.98 * (bound.prefill_s + bound.decode_s) and (
        bound.decode_s > 0.5 * bound.prefill_s
    ):
        return "KV pool"
    if bound.prefill_s >= bound.decode_s:
        return "prefill"
    return "decode"


def simulated_row(
    screened: Screened, search: Search, trial: Trial, spec: PlanSpec, *, most: bool
) -> dict[str, Any]:
    """A row answered by simulation. ``most``: also search the largest load it would hold."""
    assert trial.found is not None
    parts, outcome, found = search.parts, trial.outcome, trial.found
    per_replica = screened.candidate.gpus_per_replica
    per_engine = per_replica // screened.candidate.engines_per_replica
    cost = fleet_cost(parts.hardware, outcome, per_engine, spec.money)
    row = _base(screened)
    values = percentiles(found, spec.slo)
    tokens_in = float(found.input_tokens.sum()) / found.span_s
    tokens_out = float(found.output_tokens.sum()) / found.span_s
    row |= values
    row |= {
        "feasible": trial.holds,
        "replicas": trial.replicas,
        "gpus": trial.replicas * per_replica,
        "pools": _pools(screened, row, trial.replicas),
        "intervals": {k: v and list(v) for k, v in intervals(found, values).items()},
        "goodput_rps": goodput_rps(found, spec.slo),
        "throughput_rps": found.ttft.size / found.span_s,
        "output_tokens_per_s": tokens_out,
        "kv_occupancy": outcome.kv_occupancy,
        "kv_peak": outcome.peak_occupancy,
        "n_preempted": outcome.n_preempted,
        "largest_share": float(parts.load.peak_bytes.max()) / parts.pool,
        "binds": binds(screened),
        "binding": binding(screened),
        "checks": [
            {"key": c.key, "value": c.value, "limit": c.limit, "holds": c.holds}
            for c in trial.checks
        ],
        "bound_replicas": screened.bound_replicas,
        "bound_gap": trial.replicas / (screened.bound_replicas or 1),
        "holds": {str(n): t.holds for n, t in sorted(search.trials.items())},
        "answered_by": "simulated",
        "price_date": parts.hardware.price_date or None,
        "basis": "prior" if not parts.hardware.calibration else "calibrated",
    }
    row["fragile"] = _fragile(row)
    if cost.usd_per_hour is not None:
        low, mid, high = cost.usd_per_hour
        row |= {"usd_per_hour": mid, "usd_per_hour_low": low, "usd_per_hour_high": high}
        usd_per_s = mid / 3600.0
        busy = max(outcome.prefill_s + outcome.decode_s, 1e-300)
        prefill = usd_per_s * outcome.prefill_s / busy
        row["usd_per_million_tokens"] = usd_per_s / (tokens_in + tokens_out) * 1e6
        row["usd_per_million_input_tokens"] = prefill / tokens_in * 1e6
        row["usd_per_million_output_tokens"] = (usd_per_s - prefill) / tokens_out * 1e6
    if cost.watts is not None:
        row["energy_j_per_token"] = cost.watts / tokens_out
    if most and trial.holds:
        factor, first = search.most_load(trial.replicas)
        row["headroom"] = factor - 1.0
        row["breaks_first"] = first
        rate = _rate(search)
        row["max_rate_per_s"] = None if rate is None else rate * factor
    return _filled(row)


def _rate(search: Search) -> float | None:
    load = search.parts.load
    span = float(load.arrival_s[-1])
    return (load.size - 1) / span if span > 0 and load.size > 1 else None


def _fragile(row: dict[str, Any]) -> bool:
    """The interval of an objective's percentile reaches beyond its limit."""
    for check in row["checks"]:
        interval = row["intervals"].get(check["key"])
        if interval is not None and interval[1] > check["limit"]:
            return True
    return False
