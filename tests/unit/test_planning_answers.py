"""Metrics, closed form, search, evidence and ranking: hand-worked figures."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planning_cases import candidate, outcome, solved, spec

from costmodel.hardware import load_hardware
from costmodel.methods.parse import parse_method
from costmodel.planning.arrivals import Arrivals
from costmodel.planning.bound import bound_of
from costmodel.planning.candidate import screen
from costmodel.planning.demand import Demand
from costmodel.planning.evidence import given_up
from costmodel.planning.load import Load
from costmodel.planning.metrics import checks, goodput_rps, intervals, measured, percentiles
from costmodel.planning.money import fleet_cost, fleet_watts
from costmodel.planning.rows import KEYS
from costmodel.planning.sensitivity import sensitivities
from costmodel.planning.sentences import (
    binding_sentences,
    deploy,
    edge_sentence,
    realised_sentence,
    verdict,
)
from costmodel.planning.slo import Limit, Slo
from costmodel.planning.spec import AccuracyFloor, Money
from costmodel.planning.steps import StepTable
from costmodel.registry import load_architecture


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
        [[1.0, 1.0, 0.0, 1, 1], [2.0, 1.0, 0.0, 1, 1],
         [3.0, 0.5, 0.0, 1, 2], [3.5, 1.5, 0.0, 1, 2]],
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
    for key in ("gpu", "method_spec", "replicas"):
        assert a[key] == b[key]
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


@pytest.mark.parametrize(
    ("changes", "gpu", "miss", "reason"),
    [
        # several GPUs where 1 is allowed
        ({"candidates": {"max_gpus": 1, "gpus": ["h100-sxm"], "methods": ["full"]},
          "workload": {"rate_per_s": 60}}, "4 x h100-sxm", 4.0, "needs at least 4 GPUs"),
        # The idle TTFT: of both GPUs the faster one misses by less.
        ({"slo": {"ttft_p99_s": 0.05}}, "1 x h100-sxm", None, "on an idle replica"),
        # 141 GB of weights in 0.9 of 84.9: both devices are out, the larger one by less.
        ({"candidates": {"models": ["llama-3.1-70b"]}}, "h100-sxm", None, "do not fit"),
        # Refused for its accuracy, which has no number: still the plan to look at.
        ({"candidates": {"methods": ["kivi"]}, "accuracy": {"allow_unknown": False}},
         "2 x l40s", None, "kivi was not measured"),
    ],
)  # fmt: skip
def test_out_before_simulation_has_a_nearest_point(
    changes: dict[str, dict[str, object]], gpu: str, miss: float | None, reason: str
) -> None:
    plan = solved(spec(**changes))
    near = plan.nearest
    assert near is not None
    assert not plan.feasible
    assert near["answered_by"] == "bound"
    if miss is not None:
        assert near["miss"] == pytest.approx(miss)
    assert reason in near["reason"]
    assert f"Nearest: {gpu} with {near['method_spec']} for {near['model']}:" in verdict(plan)
    misses = [r["miss"] for r in plan.rows if r["miss"] is not None]
    assert near["miss"] == min(misses, default=None)


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
                "replicas": 2, "gpus": 2,
                "pools": [{"gpu": gpu, "rent_usd_per_hour": list(usd)}]}  # fmt: skip

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


# Words ---------------------------------------------------------------------------------------


def plan_row(**changes: object) -> dict[str, object]:
    pool = {"role": "both", "method": changes.get("method_spec", "full"), "gpu": "h100-sxm",
            "tp": 1, "pp": 1, "ep": 1, "cp": 1, "replicas": 2}  # fmt: skip
    return {"method": "full", "method_spec": "full", "model": "llama-3.1-8b", "engine": "vllm",
            "gpu": "h100-sxm", "tp": 1, "pools": [pool], **changes}  # fmt: skip


def test_commands_switch_the_method_on_where_the_engine_has_it() -> None:
    plain = deploy(plan_row(), spec())
    assert plain[0].startswith("vllm serve meta-llama/")
    assert "--max-num-batched-tokens 8192" in plain[0]
    assert "--request-rate 8" in plain[1]
    fp8 = deploy(plan_row(method="fp8_kv", method_spec="fp8_kv"), spec())
    assert "--kv-cache-dtype fp8" in fp8[0]
    assert realised_sentence(plan_row(method="fp8_kv", method_spec="fp8_kv")) is None


def test_the_load_test_carries_the_lengths_and_the_rate_of_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,100,10\n2,300,30\n")
    workload = {"input_tokens_mean": 200.0, "output_tokens_mean": 20.0, "rate_per_s": 0.5,
                "input_tokens_max": 300, "output_tokens_max": 30}  # fmt: skip
    demand = Demand(kind="trace", trace=trace, arrivals=Arrivals(kind="trace"))
    test = deploy(plan_row(), replace(spec(), demand=demand), workload)[1]
    assert "--max-model-len 330" in deploy(plan_row(), spec(), workload)[0]
    assert "--context-length 330" in deploy(plan_row(engine="sglang"), spec(), workload)[0]
    assert "--random-input-len 200 --random-output-len 20 --request-rate 0.5 " in test
    jsonl = replace(demand, trace=tmp_path / "m.jsonl")
    assert "--fixed-schedule" in deploy(plan_row(), replace(spec(), demand=jsonl), workload)[1]
    # A recorded schedule replayed at its own speed would not test twice the load.
    doubled = replace(jsonl, scale=2.0)
    test = deploy(plan_row(), replace(spec(), demand=doubled), {**workload, "rate_per_s": 1.0})[1]
    assert "--request-rate 1 " in test
    assert "--fixed-schedule" not in test
    assert "--ignore-eos" in test
    assert "--metric-percentiles 50,95,99" in test


def test_the_load_test_replays_what_a_plan_file_draws() -> None:
    drawn = replace(spec(), own_workload=True, where="my plan.toml")
    test = deploy(plan_row(), drawn, {})
    assert test[1] == "lccost trace convert 'my plan.toml' --output requests.jsonl"
    assert "--input-file requests.jsonl" in test[2]
    assert "--fixed-schedule" in test[2]
    closed = replace(drawn, demand=replace(drawn.demand, kind="concurrency", concurrency=12))
    assert "--concurrency 12" in deploy(plan_row(), closed, {})[2]


def test_commands_start_the_parallelism_that_was_planned() -> None:
    def serve(engine: str = "vllm", **degrees: int) -> str:
        pool = {**plan_row()["pools"][0], **degrees}
        return deploy(plan_row(engine=engine, pools=[pool]), spec())[0]

    # A pipeline has a micro-batch of 256 in every stage.
    assert "--pipeline-parallel-size 2" in serve(pp=2)
    assert "--max-num-seqs 512" in serve(pp=2)
    assert "--prefill-context-parallel-size 4" in serve(cp=4)
    assert "--data-parallel-size 8 --enable-expert-parallel" in serve(ep=8)
    assert "--pp-size 2" in serve("sglang", pp=2)
    assert "--disable-radix-cache" in serve("sglang")
    assert serve("sglang", ep=2).startswith("vllm bench")  # its expert ranks are laid out otherwise


def test_a_method_the_engine_lacks_is_said() -> None:
    row = plan_row(method="kivi", method_spec="kivi")
    assert len(deploy(row, spec())) == 1  # the load test alone
    assert "Rank 1 prices kivi in vllm, which does not have it" in str(realised_sentence(row))


def test_what_binds_in_words() -> None:
    def row(method: str, replicas: int) -> dict[str, object]:
        return plan_row(
            method=method, method_spec=method, feasible=True, replicas=replicas, reason=None,
            bound_replicas=1, binds="prefill",
            binding={"prefill_s": 0.5, "decode_s": 0.2, "kv_pool_s": 0.3},
        )  # fmt: skip

    same = binding_sentences([row("full", 3), row("kivi", 3)])
    assert "No method here saves a replica: prefill binds" in same[0]
    fewer = binding_sentences([row("full", 12), row("kivi", 6)])
    assert "kivi: 6 replicas instead of 12" in fewer[0]
    next_one = binding_sentences([{**row("full", 3), "binds": "KV pool"}, row("kivi", 3)])
    assert "No method here saves a replica: with them prefill binds." in next_one[0]
    # Replicas of another split are other replicas.
    split = binding_sentences([row("full", 12), {**row("kivi", 3), "pp": 2}])
    assert "instead of" not in split[0]


def test_what_decides_the_number_of_replicas() -> None:
    def said(**changes: object) -> str | None:
        values = {"feasible": True, "replicas": 3, "bound_replicas": 2, "fewer_breaks": None}
        return edge_sentence([plan_row(**{**values, **changes})])

    assert said(fewer_breaks="itl_p95_s") == "One replica fewer breaks ITL P95: latency decides."
    assert "throughput decides" in (said(bound_replicas=3) or "")
    assert said(replicas=1, bound_replicas=1) is None
    # In a plan: first tokens in 0.25 s take more replicas than the load does.
    tight = spec(
        slo={"ttft_p95_s": 0.25, "ttft_p99_s": 60}, workload={"rate_per_s": 30},
        candidates={"gpus": ["h100-sxm"], "methods": ["full"]},
    )  # fmt: skip
    row = solved(tight, details=False).feasible[0]
    assert row["replicas"] > row["bound_replicas"]
    assert row["fewer_breaks"] == "ttft_p95_s"


# Money and energy ----------------------------------------------------------------------------


def test_money_and_energy_by_hand() -> None:
    """Two engines of two H100s for 100 s: 60 s of prefill and 80 s of decode between them."""
    h100 = load_hardware("h100-sxm")  # 700 W
    run = outcome([0.0], [1.0], [100.0], [[1.0, 1.0, 0.0, 1, 1]])
    run = replace(run, replicas=2, span_s=100.0, prefill_s=60.0, decode_s=80.0, kv_occupancy=0.5)
    watts, decode = fleet_watts(h100, run, 2) or (0.0, 0.0)
    # Prefill at 0.9, decode at 0.43 + 0.43 x 0.5 = 0.645, 60 s idle at 0.11 of 700 W; two GPUs.
    assert decode == pytest.approx(80 * 0.645 * 700 * 2 / 100)
    assert watts == pytest.approx((60 * 0.9 + 80 * 0.645 + 60 * 0.11) * 700 * 2 / 100)
    cost = fleet_cost(h100, run, 2, Money(file=None, power_usd_per_kwh=0.5, pue=1.2))
    low, mid, high = h100.price_usd_per_hour or (0.0, 0.0, 0.0)
    power = watts / 1000 * 1.2 * 0.5
    assert cost.usd_per_hour == pytest.approx((4 * low + power, 4 * mid + power, 4 * high + power))


def test_tokens_share_the_cost_of_the_fleet() -> None:
    plan = solved(spec(candidates={"gpus": ["h100-sxm"], "methods": ["full"]}), details=False)
    row = plan.feasible[0]
    requests = spec().demand.requests()
    tokens_in, tokens_out = requests.input_tokens.mean(), requests.output_tokens.mean()
    both = (
        row["usd_per_million_input_tokens"] * tokens_in
        + row["usd_per_million_output_tokens"] * tokens_out
    ) / (tokens_in + tokens_out)
    assert row["usd_per_million_tokens"] == pytest.approx(both, rel=0.02)  # less its warm-up
    rate = row["throughput_rps"] * (tokens_in + tokens_out)
    assert row["usd_per_hour"] / 3600 / rate * 1e6 == pytest.approx(
        row["usd_per_million_tokens"], rel=0.02
    )
    assert 0 < row["energy_j_per_token"] < row["fleet_energy_j_per_token"]
    assert row["usd_per_hour_low"] <= row["usd_per_hour"] <= row["usd_per_hour_high"]
