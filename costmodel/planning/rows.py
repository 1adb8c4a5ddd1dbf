"""The row of one candidate, with the keys of the contract; unknown is None."""

from typing import Any

from costmodel.planning.candidate import Screened
from costmodel.planning.metrics import goodput_rps, intervals, percentiles
from costmodel.planning.money import Cost, fleet_cost, rent_usd_per_hour
from costmodel.planning.search import Search, Trial
from costmodel.planning.spec import PlanSpec

#: Keys of a row, in order.
KEYS = (
    "rank", "feasible", "reason", "model", "method", "method_spec", "level", "engine", "gpu",
    "tp", "pp", "ep", "cp", "replicas", "gpus", "pools", "usd_per_hour", "usd_per_hour_low",
    "usd_per_hour_high", "usd_per_million_tokens", "usd_per_million_input_tokens",
    "usd_per_million_output_tokens", "energy_j_per_token", "fleet_energy_j_per_token",
    "ttft_p50_s", "ttft_p99_s",
    "tpot_p50_s", "tpot_p95_s", "itl_p95_s", "itl_p99_s", "e2e_p99_s", "intervals",
    "goodput_rps", "throughput_rps", "output_tokens_per_s", "kv_occupancy", "kv_peak",
    "largest_share", "n_preempted", "headroom", "max_rate_per_s", "breaks_first", "fewer_breaks",
    "binds",
    "binding", "checks", "fragile", "accuracy_drop_points", "accuracy_source",
    "accuracy_analogy", "bound_replicas", "bound_gpus", "bound_gap", "bound_usd_per_hour",
    "holds", "answered_by", "miss", "price_date", "basis",
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
        "pp": c.pp,
        "ep": c.ep,
        "cp": c.cp,
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


def pool_of(screened: Screened, role: str, replicas: int) -> dict[str, Any]:
    """One pool of a plan."""
    c, names = screened.candidate, screened.names
    gpus = replicas * c.gpus_per_replica
    rent = None
    if screened.parts is not None:
        rent = rent_usd_per_hour(screened.parts.hardware, gpus)
    return {
        "role": role, "model": names["model"], "method": names["method_spec"],
        "gpu": names["gpu"], "tp": c.tp, "pp": c.pp, "ep": c.ep, "cp": c.cp, "replicas": replicas,
        "gpus": gpus, "rent_usd_per_hour": rent and list(rent),
    }  # fmt: skip


def filled(row: dict[str, Any]) -> dict[str, Any]:
    """All keys of the contract in order, then what else is there."""
    return {k: row.get(k) for k in (*KEYS, *(k for k in row if k not in KEYS))}


def bound_row(screened: Screened, reason: str | None = None) -> dict[str, Any]:
    """A row answered without a simulation: infeasible, or beaten by its own bound."""
    row = _base(screened)
    row |= {"reason": reason or screened.reason, "miss": screened.miss}
    if screened.parts is not None and screened.bound_replicas is not None:
        replicas = screened.bound_replicas
        gpus = replicas * screened.candidate.gpus_per_replica
        usd = rent_usd_per_hour(screened.parts.hardware, gpus)
        row |= {
            "bound_replicas": replicas,
            "bound_gpus": gpus,
            "binding": binding(screened),
            "binds": binds(screened),
            "price_date": screened.parts.hardware.price_date or None,
        }
        if usd is not None:
            row |= {"bound_usd_per_hour": usd[1]}
    return filled(row)


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
        "kv_pool_bytes": screened.candidate.parallel.gpu_bytes(
            screened.parts.pool, screened.parts.model
        ),
        "weights_bytes": screened.candidate.parallel.weights_bytes(screened.parts.model),
        "usable_bytes": screened.parts.hardware.memory_bytes
        * screened.parts.model.options.memory_fraction,
    }


def binds(screened: Screened) -> str:
    """What limits a replica's rate in closed form."""
    assert screened.parts is not None
    bound = screened.parts.bound
    if (
        bound.memory_binds
        and bound.kv_s > 0.98 * (bound.prefill_s + bound.decode_s)
        and (bound.decode_s > 0.5 * bound.prefill_s)
    ):
        return "KV pool"
    if bound.prefill_s >= bound.decode_s:
        return "prefill"
    return "decode"


def outcome_fields(trial: Trial, spec: PlanSpec) -> dict[str, Any]:
    """What a simulation says, whatever was simulated."""
    assert trial.found is not None
    outcome, found = trial.outcome, trial.found
    values = percentiles(found, spec.slo)
    fields: dict[str, Any] = {
        **values,
        "feasible": trial.holds,
        "intervals": {k: v and list(v) for k, v in intervals(found, values).items()},
        "goodput_rps": goodput_rps(found, spec.slo),
        "throughput_rps": found.ttft.size / found.span_s,
        "output_tokens_per_s": float(found.output_tokens.sum()) / found.span_s,
        "kv_occupancy": outcome.kv_occupancy,
        "kv_peak": outcome.peak_occupancy,
        "n_preempted": outcome.n_preempted,
        "checks": [
            {"key": c.key, "value": c.value, "limit": c.limit, "holds": c.holds}
            for c in trial.checks
        ],
        "answered_by": "simulated",
    }
    fields["fragile"] = _fragile(fields)
    return fields


def money_fields(cost: Cost, trial: Trial) -> dict[str, Any]:
    """Cost of a fleet per hour and per token; prompts and answers share by busy seconds."""
    assert trial.found is not None
    outcome, found = trial.outcome, trial.found
    tokens_in = float(found.input_tokens.sum()) / found.span_s
    tokens_out = float(found.output_tokens.sum()) / found.span_s
    fields: dict[str, Any] = {}
    if cost.usd_per_hour is not None:
        low, mid, high = cost.usd_per_hour
        usd_per_s = mid / 3600.0
        busy = max(outcome.prefill_s + outcome.decode_s, 1e-300)
        prefill = usd_per_s * outcome.prefill_s / busy
        fields = {
            "usd_per_hour": mid,
            "usd_per_hour_low": low,
            "usd_per_hour_high": high,
            "usd_per_million_tokens": usd_per_s / (tokens_in + tokens_out) * 1e6,
            "usd_per_million_input_tokens": prefill / tokens_in * 1e6,
            "usd_per_million_output_tokens": (usd_per_s - prefill) / tokens_out * 1e6,
        }
    if cost.watts is not None and cost.decode_watts is not None:
        fields["energy_j_per_token"] = cost.decode_watts / tokens_out
        fields["fleet_energy_j_per_token"] = cost.watts / tokens_out
    return fields


def simulated_row(
    screened: Screened, search: Search, trial: Trial, spec: PlanSpec
) -> dict[str, Any]:
    """A row answered by simulation."""
    parts = search.parts
    per_replica = screened.candidate.gpus_per_replica
    per_engine = per_replica // screened.candidate.engines_per_replica
    row = _base(screened)
    row |= outcome_fields(trial, spec)
    row |= {
        "replicas": trial.replicas,
        "gpus": trial.replicas * per_replica,
        "pools": [pool_of(screened, "both", trial.replicas)],
        "largest_share": float(parts.load.peak_bytes.max()) / parts.pool,
        "binds": binds(screened),
        "binding": binding(screened),
        "bound_replicas": screened.bound_replicas,
        "bound_gap": trial.replicas / (screened.bound_replicas or 1),
        "fewer_breaks": search.breaks_with_fewer(trial.replicas),
        "holds": {str(n): t.holds for n, t in sorted(search.trials.items())},
        "price_date": parts.hardware.price_date or None,
        "basis": parts.steps.basis,
    }
    cost = fleet_cost(parts.hardware, trial.outcome, per_engine, spec.money)
    row |= money_fields(cost, trial)
    return filled(row)


def _fragile(row: dict[str, Any]) -> bool:
    """The interval of an objective's percentile reaches beyond its limit."""
    for check in row["checks"]:
        interval = row["intervals"].get(check["key"])
        if interval is not None and interval[1] > check["limit"]:
            return True
    return False
