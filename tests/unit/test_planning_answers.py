"""Metrics, closed form, search, evidence and ranking: hand-worked figures."""

import math
from pathlib import Path

import numpy as np
import pytest

from costmodel.planning.bound import bound_of
from costmodel.planning.candidate import Candidate, screen
from costmodel.planning.evidence import given_up
from costmodel.planning.executors import Inline
from costmodel.planning.fleet import Outcome
from costmodel.planning.load import Load
from costmodel.planning.metrics import checks, goodput_rps, intervals, measured, percentiles
from costmodel.planning.plan import make_plan
from costmodel.planning.rows import KEYS
from costmodel.planning.sensitivity import sensitivities
from costmodel.planning.slo import Limit, Slo
from costmodel.planning.spec import AccuracyFloor, PlanSpec, plan_from_table
from costmodel.planning.steps import StepTable
from costmodel.methods.parse import parse_method
from costmodel.registry import load_architecture


def outcome(arrival: list[float], first: list[float], finish: list[float], gaps: list[list[float]],
            stalls: list[tuple[int, float]] = []) -> Outcome:  # noqa: B006
    columns = [np.array(c, dtype=float) for c in zip(*gaps, strict=True)]
    table = np.array(stalls, dtype=float).reshape(-1, 2)
    return Outcome(
        arrival_s=np.array(arrival), first_s=np.array(first), finish_s=np.array(finish),
        replica=np.zeros(len(arrival), dtype=int), gaps=tuple(columns),  # type: ignore[arg-type]
        gap_replica=np.array([0]), stalls=(table[:, 0].astype(int), table[:, 1]), n_preempted=0,
        prefill_s=1.0, decode_s=1.0, span_s=10.0, kv_occupancy=0.5, peak_occupancy=0.9, replicas=1,
    )  # fmt: skip


def load(prompt: list[int], output: list[int]) -> Load:
    p, n = np.array(prompt, dtype=float), np.array(output, dtype=float)
    ones = np.ones(p.size)
    return Load(
        arrival_s=0 * p, input_tokens=p, prompt_tokens=p, cached_tokens=0 * p, output_tokens=n,
        before_s=0 * p, held_bytes=p, held_slope=ones, moved_bytes=p, moved_slope=ones,
    )  # fmt: skip


# Two requests. The first waits 1 s, gets 5 tokens at 1, 2, 3, 4 and 5 s; the second arrives at 2 s,
# has its first token at 3 s (together with the gap 2..3) and its last at 5 s.
TWO = outcome(
    [0.0, 2.0], [1.0, 3.0], [5.0, 5.0],
    # start, first gap, growth, iterations, sequences
    [[1.0, 1.0, 0.0, 1, 1], [2.0, 1.0, 0.0, 1, 1], [3.0, 1.0, 0.0, 2, 2]],
)  # fmt: skip


def test_definitions_by_hand() -> None:
    found = measured(TWO, load([10, 20], [5, 3]), Slo())
    assert found.ttft.tolist() == [1.0, 1.0]
    assert found.e2e.tolist() == [5.0, 3.0]
    assert found.tpot.tolist() == [1.0, 1.0]  # (5 - 1) / 4 and (3 - 1) / 2
    assert found.itl_weight.sum() == 6  # 4 gaps of the first, 2 of the second


def test_tpot_and_itl_are_different_numbers() -> None:
    # One request of 11 tokens: nine gaps of 0.1 s and one of 9.1 s.
    run = outcome([0.0], [1.0], [11.0], [[1.0, 0.1, 0.0, 9, 1], [1.9, 9.1, 0.0, 1, 1]])
    found = measured(run, load([10], [11]), Slo())
    assert found.percentile("tpot", 99) == pytest.approx(1.0)
    assert found.percentile("itl", 50) == pytest.approx(0.1)
    assert found.percentile("itl", 99) == pytest.approx(9.1)


def test_growing_gaps_keep_their_weight() -> None:
    # 1,000 iterations from 10 ms, 10 us more each: the median gap is 10 ms + 5 ms.
    run = outcome([0.0], [0.0], [15.0], [[0.0, 0.01, 1e-5, 1000, 1]])
    found = measured(run, load([10], [1001]), Slo())
    assert found.itl_weight.sum() == pytest.approx(1000)
    assert found.percentile("itl", 50) == pytest.approx(0.015, rel=0.05)


def test_goodput_needs_every_limit() -> None:
    slow_gap = outcome(
        [0.0, 2.0], [1.0, 3.0], [5.0, 5.0],
        [[1.0, 1.0, 0.0, 1, 1], [2.0, 1.0, 0.0, 1, 1], [3.0, 0.5, 0.0, 1, 2], [3.5, 1.5, 0.0, 1, 2]],
    )  # fmt: skip
    work = load([10, 20], [5, 3])
    limits = [
        (Limit(metric="ttft", percentile=99, limit_s=1.0), 2),
        (Limit(metric="ttft", percentile=99, limit_s=0.9), 0),
        (Limit(metric="e2e", percentile=50, limit_s=4.0), 1),
        # 1.5 s is 1 of 4 gaps of the first, 1 of 2 of the second: P60 lets 40 % pass.
        (Limit(metric="itl", percentile=60, limit_s=1.4), 1),
        (Limit(metric="itl", percentile=50, limit_s=1.4), 2),
    ]
    for limit, good in limits:
        slo = Slo(limits=(limit,))
        found = measured(slow_gap, work, slo)
        assert goodput_rps(found, slo) == pytest.approx(good / 5.0), limit


def test_a_stall_counts_as_a_gap() -> None:
    run = outcome([0.0], [1.0], [9.0], [[1.0, 1.0, 0.0, 1, 1], [8.0, 1.0, 0.0, 1, 1]], [(0, 6.0)])
    slo = Slo(limits=(Limit(metric="itl", percentile=60, limit_s=2.0),))
    found = measured(run, load([10], [4]), slo)
    assert found.percentile("itl", 99) == 6.0
    assert found.over_itl[(60, 2.0)].tolist() == [pytest.approx(1 / 3)]


def test_scaled_ttft_objective() -> None:
    # 0.5 s + 0.1 s per 1,000 tokens: limits 0.6 and 2.5 s for prompts of 1,000 and 20,000.
    run = outcome([0.0, 0.0], [1.0, 2.0], [3.0, 3.0], [[1.0, 1.0, 0.0, 2, 1]])
    slo = Slo(ttft_s_per_1k_tokens=0.1, attainment=0.5)
    found = measured(run, load([1000, 20_000], [3, 2]), slo)
    verdict = {c.key: c for c in checks(found, slo)}
    assert verdict["ttft_per_1k_share"].value == 0.5
    assert verdict["attainment"].holds
    assert not checks(found, Slo(ttft_s_per_1k_tokens=0.1))[0].holds  # 99 % by default


def test_intervals_hold_the_percentile_and_shrink() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (2_000, 50_000):
        ttft = rng.exponential(1.0, n)
        run = outcome([0.0] * n, ttft.tolist(), (ttft + 1).tolist(), [[0.0, 1.0, 0.0, 1, n]])
        found = measured(run, load([10] * n, [2] * n), Slo())
        low, high = intervals(found, ["ttft_p50_s"])["ttft_p50_s"] or (0.0, 0.0)
        assert low < math.log(2) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_percentiles_name_what_is_asked() -> None:
    slo = Slo(limits=(Limit(metric="tpot", percentile=99.9, limit_s=1),))
    names = percentiles(measured(TWO, load([10, 20], [5, 3]), slo), slo)
    assert {"ttft_p99_s", "itl_p95_s", "tpot_p99.9_s"} <= set(names)


# Closed form ---------------------------------------------------------------------------------


def steps(chunk: int = 1000, max_batch: int = 8) -> StepTable:
    """D = 10 ms + 1 ms n + 1 us R; L = 1 us per token; no mixing."""
    tokens = np.arange(1025.0)
    return StepTable(
        chunk_tokens=chunk, max_batch=max_batch, knots=[0.0],
        base=[[], *([0.01 + 0.001 * n] for n in range(1, max_batch + 1))],
        slope=[[], *([1e-6] for _ in range(max_batch))], exact_s=(1e-6 * tokens).tolist(),
        coarse_s=[1e-6 * (1024 + 64 * k) for k in range(99)], prompt_s=[0.0] * 99,
        prefix_s=[0.0] * 99, prompt_shift=6, floor_s=0.0, alone_s=0.0, host_s=0.0,
    )  # fmt: skip


def test_closed_form_by_hand() -> None:
    # 100 prompt tokens and 11 output: N = 10 iterations, mean state 105 bytes at 105 moved.
    # Room for 4.2 sequences; at 4: D = 14 ms + 420 us, plus 4/10 of a prompt (40 us).
    found = bound_of(load([100], [11]), steps(), 4 * 105.0)
    iteration = 0.014 + 420e-6 + 40e-6
    assert found.batch == 4
    assert found.rate_per_s == pytest.approx(0.4 / iteration)
    assert found.prefill_s == pytest.approx(100e-6)
    assert found.decode_s == pytest.approx(10 * 0.01442 / 4)
    assert found.memory_binds
    assert found.replicas(0.8 / iteration) == 2
    assert not bound_of(load([100], [11]), steps(), 1e9).memory_binds


def test_answers_of_one_token_need_prefill_only() -> None:
    found = bound_of(load([500], [1]), steps(), 1e9)
    assert found.rate_per_s == pytest.approx(1 / 500e-6)
    assert found.decode_s == 0.0


# Screening and whole plans -------------------------------------------------------------------


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


def solved(plan_spec: PlanSpec, **options: bool):  # type: ignore[no-untyped-def]
    requests = plan_spec.demand.requests()
    with Inline(plan_spec, requests) as executor:
        return make_plan(plan_spec, requests, executor, lambda a, b: lambda c: None, **options)


def candidate(**changes: object) -> Candidate:
    values = {"model": "llama-3.1-8b", "method": "full", "level": "ideal", "gpu": "h100-sxm",
              "engine": None, "tp": 1, **changes}  # fmt: skip
    return Candidate(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "demand", "reason"),
    [
        ({"model": "llama-3.1-70b"}, {}, "weights of"),
        ({"tp": 16}, {}, "more than the 8 GPUs of a node"),
        ({"tp": 3}, {}, "does not shard"),
        ({"gpu": "l4"}, {"input_tokens": 120_000}, "the pool holds"),
        ({"model": "llama-2-7b"}, {"input_tokens": 6000}, "llama-2-7b takes 4,096"),
        ({"ep": 2}, {}, "has no experts"),
        ({"method": "kivi", "model": "mamba2-2.7b"}, {}, "kivi acts on"),
        ({"gpu": "t4"}, {}, "no bf16 peak"),
    ],
)
def test_infeasible_candidates_say_why(
    changes: dict[str, object], demand: dict[str, object], reason: str
) -> None:
    plan_spec = spec(workload=demand)
    found = screen(candidate(**changes), plan_spec, plan_spec.demand.requests())
    assert found.reason is not None
    assert reason in found.reason


def test_an_objective_no_fleet_can_meet() -> None:
    plan_spec = spec(workload={"input_tokens": 100_000}, slo={"ttft_p99_s": 2})
    found = screen(candidate(), plan_spec, plan_spec.demand.requests())
    assert found.reason is not None
    assert "TTFT P99" in found.reason
    assert "the prompt of 100,000 tokens alone takes" in found.reason


def test_unknown_accuracy_is_refused_unless_allowed() -> None:
    architecture, stack = load_architecture("llama-3.1-8b"), parse_method("kivi")
    prompts = np.full(10, 4000.0)
    refused = given_up(architecture, stack, prompts, AccuracyFloor())
    assert refused.drop_points is None
    assert refused.refusal is not None
    assert "allow_unknown" in refused.refusal
    assert given_up(architecture, stack, prompts, AccuracyFloor(allow_unknown=True)).refusal is None
    full = given_up(architecture, parse_method("full"), prompts, AccuracyFloor(max_drop_points=0.0))
    assert (full.drop_points, full.refusal) == (0.0, None)


def test_evidence_by_analogy_is_marked() -> None:
    # KIVI-2 was measured on Llama-3-8B-Instruct, which is alike; the 8B of 3.1 was not.
    architecture = load_architecture("llama-3.1-8b")
    found = given_up(
        architecture, parse_method("kivi"), np.full(4, 4000.0), AccuracyFloor(allow_analogy=True)
    )
    assert found.analogy
    assert found.drop_points is not None
    assert "by analogy with" in found.source
    other = given_up(
        load_architecture("llama-3.1-70b"), parse_method("kivi"), np.full(4, 4000.0),
        AccuracyFloor(allow_analogy=True),
    )  # fmt: skip
    assert other.drop_points is None  # nine times the size is another class


def test_a_plan_end_to_end() -> None:
    plan = solved(spec(), details=True)
    assert plan.feasible
    for row in plan.rows:
        assert set(KEYS) <= set(row)
    best = plan.feasible[0]
    assert best["rank"] == 1
    assert best["gpus"] == best["replicas"] * best["tp"]
    assert best["holds"][str(best["replicas"])]
    assert best["holds"][str(best["replicas"] + 1)]
    assert best["replicas"] >= best["bound_replicas"]
    assert best["ttft_p99_s"] <= 5
    assert best["headroom"] >= 0
    low, high = best["intervals"]["ttft_p99_s"]
    assert low <= best["ttft_p99_s"] * 1.01
    assert best["ttft_p99_s"] <= high * 1.01
    costs = [r["usd_per_hour"] for r in plan.feasible]
    assert costs == sorted(costs)
    shares = best["usd_per_million_input_tokens"], best["usd_per_million_output_tokens"]
    assert min(shares) < best["usd_per_million_tokens"] < max(shares)
    names = {s["scenario"] for s in plan.sensitivities}
    assert "twice the rate" in names
    assert "h100-sxm at its low price" in names


def test_pruned_rows_are_listed_and_change_nothing() -> None:
    pruned, whole = solved(spec(), details=False), solved(spec(), prune=False, details=False)
    assert [r["method_spec"] for r in pruned.rows] != []
    assert len(pruned.rows) == len(whole.rows) == 4
    a, b = pruned.feasible[0], whole.feasible[0]
    assert (a["gpu"], a["method_spec"], a["replicas"]) == (b["gpu"], b["method_spec"], b["replicas"])
    for row in pruned.rows:
        if not row["feasible"]:
            assert row["answered_by"] == "bound"
            assert "not simulated" in row["reason"]


def test_nothing_feasible_has_a_nearest_point() -> None:
    """The closed form says one GPU would do, the simulation says it does not."""
    one = {"max_gpus": 1, "gpus": ["h100-sxm"], "methods": ["full"]}
    plan = solved(spec(candidates=one, workload={"rate_per_s": 12}, slo={"ttft_p99_s": 1.5}))
    assert not plan.feasible
    near = plan.nearest
    assert near is not None
    assert near["bound_replicas"] == 1
    assert near["miss"] > 1
    assert "with all 1 GPUs allowed: itl_p95" in near["reason"]


def test_out_before_simulation_says_so() -> None:
    few = {"max_gpus": 1, "gpus": ["h100-sxm"], "methods": ["full"]}
    plan = solved(spec(candidates=few, workload={"rate_per_s": 60}))
    assert plan.nearest is None
    assert "needs at least" in plan.rows[0]["reason"]


def test_the_same_seed_gives_the_same_rows() -> None:
    assert solved(spec(), details=False).rows == solved(spec(), details=False).rows


def test_longer_answers_of_a_method_cost() -> None:
    plan_spec = spec(workload={"output_tokens_factor": {"kivi": 3.0}})
    requests = plan_spec.demand.requests()
    plain = screen(candidate(method="kivi"), spec(), requests).parts
    longer = screen(candidate(method="kivi"), plan_spec, requests).parts
    assert plain is not None
    assert longer is not None
    assert longer.load.output_tokens.sum() == pytest.approx(3 * plain.load.output_tokens.sum())
    assert longer.bound.rate_per_s < plain.bound.rate_per_s


def test_a_price_can_flip_the_ranking() -> None:
    def row(gpu: str, rank: int, usd: tuple[float, float, float]) -> dict[str, object]:
        return {"gpu": gpu, "rank": rank, "model": "m", "method_spec": "full", "tp": 1,
                "usd_per_hour_low": usd[0], "usd_per_hour": usd[1], "usd_per_hour_high": usd[2],
                "replicas": 2, "gpus": 2}  # fmt: skip

    rows = [row("a", 1, (2.0, 4.0, 9.0)), row("b", 2, (4.5, 5.0, 6.0))]
    needs = [{n: 1.5 for n in _scenarios()}, {n: 1.5 for n in _scenarios()}]
    found = {s["scenario"]: s for s in sensitivities(rows, needs, 64)}
    assert found["a at its high price"]["flips"]
    assert found["a at its high price"]["cheapest"] == "m full on b"
    assert not found["a at its low price"]["flips"]
    assert not found["twice the rate"]["flips"]


def _scenarios() -> list[str]:
    from costmodel.planning.sensitivity import SCENARIOS

    return [s.name for s in SCENARIOS]
