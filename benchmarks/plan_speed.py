"""Speed of planning: one trace, a million requests, a whole plan.

    python benchmarks/plan_speed.py                 the shipped sample, repeated to 12,000 requests
    python benchmarks/plan_speed.py --trace FILE    a trace of your own
    python benchmarks/plan_speed.py --skip-million

Goals: 12,000 requests in under 1 s, 1,000,000 requests in under 60 s and 2 GiB, and a plan over
5 methods x 4 GPUs x 3 tensor-parallel degrees in under 60 s, on two cores.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from costmodel.planning.candidate import Candidate, screen
from costmodel.planning.executors import open_executor
from costmodel.planning.metrics import measured
from costmodel.planning.plan import make_plan
from costmodel.planning.requests import Requests
from costmodel.planning.search import Search
from costmodel.planning.spec import PlanSpec, plan_from_table

SAMPLE = Path(__file__).parents[1] / "tests/data/traces/mooncake_conversation_1000.jsonl"
METHODS = ["full", "fp8_kv", "kivi", "flexgen", "snapkv:keep_tokens=4096"]
GPUS = ["h100-sxm", "h200-sxm", "a100-sxm-80gb", "l40s"]


def spec_of(trace: Path, workload: dict[str, object] | None = None) -> PlanSpec:
    return plan_from_table(
        {
            "workload": workload or {"trace": str(trace)},
            "slo": {"ttft_p99_s": 30, "itl_p95_ms": 200},
            "candidates": {
                "models": ["llama-3.1-8b"], "methods": METHODS, "gpus": GPUS, "tp": [1, 2, 4],
                "max_gpus": 32,
            },
            "accuracy": {"allow_unknown": True},
        },
        "benchmark",
        Path(),
    )  # fmt: skip


def repeated(trace: Requests, n: int) -> Requests:
    """A trace end to end until it has ``n`` requests."""
    times = -(-n // trace.size)
    shift = np.repeat(np.arange(times) * (trace.span_s + 3.0), trace.size)
    columns = {
        name: np.tile(getattr(trace, name), times)[:n]
        for name in ("input_tokens", "output_tokens", "prefix_tokens")
    }
    arrival = (np.tile(trace.arrival_s, times) + shift)[:n]
    return Requests(name=f"{trace.name} x {times}", arrival_s=arrival, **columns)


def simulation(requests: Requests, spec: PlanSpec, replicas: int) -> None:
    candidate = Candidate(
        model="llama-3.1-8b", method="full", level="ideal", gpu="h100-sxm", engine=None, tp=1
    )
    start, cpu = time.perf_counter(), cpu_s()
    parts = screen(candidate, spec, requests).parts
    assert parts is not None
    screened = time.perf_counter()
    trial = Search(parts, spec).run(replicas, whole=True)
    ran = time.perf_counter()
    found = measured(trial.outcome, parts.load, spec.slo)
    p99 = found.percentile("ttft", 99)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    events = trial.outcome.gaps[0].size
    print(
        f"{requests.size:>9,} requests, {replicas} replicas: tables and loads "
        f"{screened - start:.2f} s, simulation and verdict {ran - screened:.2f} s "
        f"({events:,} events), percentiles {done - ran:.2f} s, TTFT P99 {p99:.1f} s, peak "
        f"{peak:.2f} GiB, {cpu_s() - cpu:.1f} s of CPU in all"
    )


def cpu_s() -> float:
    """Of this process and of workers that have ended."""
    both = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both)


def whole_plan(spec: PlanSpec, requests: Requests, workers: int) -> None:
    start, cpu = time.perf_counter(), cpu_s()
    with open_executor("local", spec, requests, workers) as executor:
        plan = make_plan(spec, requests, executor, lambda label, n: lambda done: None)
    seconds, cpu = time.perf_counter() - start, cpu_s() - cpu
    simulated = sum(r["answered_by"] == "simulated" for r in plan.rows)
    best = plan.feasible[0]
    print(
        f"plan of {len(plan.rows)} candidates ({simulated} simulated, the others beaten by their "
        f"closed form) with details on {workers} processes: {seconds:.1f} s, {cpu:.1f} s of CPU; "
        "rank 1 is "
        f"{best['gpus']} x {best['gpu']} with {best['method_spec']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--skip-million", action="store_true")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    spec = spec_of(options.trace or SAMPLE)
    trace = spec.demand.requests()  # as a plan without a prefix cache reads it
    requests = trace if options.trace else repeated(trace, 12_031)
    simulation(requests, spec, 4)
    whole_plan(spec, requests, options.workers)
    if not options.skip_million:
        simulation(repeated(trace, 1_000_000), spec, 4)


if __name__ == "__main__":
    sys.exit(main())
