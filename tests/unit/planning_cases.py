"""What the planning tests share: a small plan, a candidate, a hand-made outcome."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from costmodel.planning.candidate import Candidate
from costmodel.planning.executors import Inline
from costmodel.planning.fleet import Outcome
from costmodel.planning.plan import Plan, make_plan
from costmodel.planning.spec import PlanSpec, plan_from_table


def outcome(
    arrival: list[float],
    first: list[float],
    finish: list[float],
    gaps: list[list[float]],
    stalls: Sequence[tuple[int, float]] = (),
) -> Outcome:
    columns = [np.array(c, dtype=float) for c in zip(*gaps, strict=True)]
    table = np.array(stalls, dtype=float).reshape(-1, 2)
    return Outcome(
        arrival_s=np.array(arrival), first_s=np.array(first), finish_s=np.array(finish),
        replica=np.zeros(len(arrival), dtype=int), gaps=tuple(columns),  # type: ignore[arg-type]
        gap_replica=np.array([0]), stalls=(table[:, 0].astype(int), table[:, 1]), n_preempted=0,
        prefill_s=1.0, decode_s=1.0, span_s=10.0, kv_occupancy=0.5, peak_occupancy=0.9, replicas=1,
    )  # fmt: skip


def spec(**changes: dict[str, object]) -> PlanSpec:
    table: dict[str, dict[str, object]] = {
        "workload": {
            "rate_per_s": 8, "requests": 600, "seed": 3,
            "input_tokens": {"distribution": "lognormal", "mean": 2000, "p99": 12000,
                             "maximum": 30000},
            "output_tokens": {"distribution": "exponential", "mean": 100, "maximum": 800},
        },
        "slo": {"ttft_p99_s": 5, "itl_p95_ms": 100},
        "candidates": {"models": ["llama-3.1-8b"], "gpus": ["h100-sxm", "l40s"],
                       "methods": ["full", "kivi"], "max_gpus": 24},
        "accuracy": {"allow_unknown": True},
    }  # fmt: skip
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value}
    return plan_from_table(table, "plan.toml", Path())


def solved(plan_spec: PlanSpec, **options: bool) -> Plan:
    requests = plan_spec.demand.requests()
    with Inline(plan_spec, requests) as executor:
        return make_plan(plan_spec, requests, executor, lambda a, b: lambda c: None, **options)


def candidate(**changes: object) -> Candidate:
    values = {"model": "llama-3.1-8b", "method": "full", "level": "ideal", "gpu": "h100-sxm",
              "engine": None, "tp": 1, **changes}  # fmt: skip
    return Candidate(**values)  # type: ignore[arg-type]
