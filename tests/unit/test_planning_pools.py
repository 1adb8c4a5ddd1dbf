"""Several pools, mixed fleets and parallelism inside a replica."""

import math
from pathlib import Path

import numpy as np
import pytest
from planning_cases import candidate, outcome, solved, spec

from costmodel.planning.candidate import Parts, screen
from costmodel.planning.disaggregated import Pair, PairSearch, screen_pair
from costmodel.planning.mixed import cheapest_mix
from costmodel.planning.rows import binding
from costmodel.planning.search import backlog


def test_disaggregated_pools_conserve_and_send_compressed_state() -> None:
    plan_spec = spec(workload={"requests": 300})
    requests = plan_spec.demand.requests()
    sent = {}
    for method in ("full", "kivi"):
        one = candidate(method=method)
        screened = screen_pair(Pair(prefill=one, decode=one), plan_spec, requests)
        assert screened.parts is not None
        search = PairSearch(screened, plan_spec)
        search.set_prefill(2)
        few, many = search.run(1, whole=True), search.run(3, whole=True)
        # First tokens come from the prefill pool alone.
        assert np.array_equal(few.outcome.first_s, many.outcome.first_s)
        output = screened.parts.answers.output_tokens
        _, _, _, m, n = few.outcome.gaps
        assert (m * n).sum() + few.outcome.stalls[0].size == (output - 1).sum()
        assert np.all(few.outcome.finish_s >= few.outcome.first_s)
        several = output > 1
        second = few.outcome.decoding_s
        assert second is not None
        waited = (second - few.outcome.first_s)[several]
        assert np.all(waited >= screened.parts.transfer_s[several])
        sent[method] = screened.parts.transfer_s.mean()
    assert sent["kivi"] < sent["full"] / 3


def test_a_disaggregated_plan_end_to_end() -> None:
    plan = solved(spec(candidates={"disaggregated": True, "gpus": ["h100-sxm"]}), details=True)
    rows = [r for r in plan.rows if len(r["pools"]) == 2]
    assert rows
    for row in rows:
        assert [p["role"] for p in row["pools"]] == ["prefill", "decode"]
        assert row["gpus"] == sum(p["gpus"] for p in row["pools"])
        n, m = (p["replicas"] for p in row["pools"])
        assert set(row["holds"]) == {f"{n}+{m}", f"{n}+{m + 1}", f"{n + 1}+{m}"}
        assert row["transfer_p50_s"] > 0


def brute_force(
    rates: np.ndarray, capacity: np.ndarray, usd: np.ndarray, gpus: np.ndarray, max_gpus: int
) -> float:
    """Every combination of counts; whether shares exist is a linear program."""
    from itertools import product

    from scipy.optimize import linprog

    n_types, n_classes = capacity.shape
    best = math.inf
    work = np.where(capacity > 0, rates / np.where(capacity > 0, capacity, 1), np.inf)
    for counts in product(range(max_gpus + 1), repeat=n_types):
        cost = float(np.dot(counts, usd))
        if np.dot(counts, gpus) > max_gpus or cost >= best:
            continue
        finite = np.where(np.isfinite(work), work, 0.0)
        rows = np.zeros((n_types, n_types * n_classes))
        for g in range(n_types):
            rows[g, g * n_classes : (g + 1) * n_classes] = finite[g]
        whole = np.tile(np.eye(n_classes), n_types)
        limits = [(0, 1 if np.isfinite(w) else 0) for w in work.ravel()]
        found = linprog(np.zeros(rows.shape[1]), rows, counts, whole, np.ones(n_classes), limits)
        if found.status == 0:
            best = cost
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_integer_program_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = rng.uniform(0.5, 3.0, 3)
    capacity = rng.uniform(0.3, 2.0, (3, 3)) * (rng.random((3, 3)) > 0.2)
    capacity[0] = np.maximum(capacity[0], 0.4)
    usd = rng.uniform(1.0, 4.0, 3)
    gpus = rng.choice([1.0, 2.0, 4.0], 3)
    usd *= gpus
    mix = cheapest_mix(rates, capacity, usd, gpus, 12)
    best = brute_force(rates, capacity, usd, gpus, 12)
    if mix is None:
        assert best == math.inf
    else:
        assert mix.usd_per_hour == pytest.approx(best)
        assert np.dot(mix.counts, gpus) <= 12
        assert mix.shares.sum(axis=0) == pytest.approx(np.ones(3))


def test_no_server_for_a_class_means_no_mix() -> None:
    assert cheapest_mix(np.ones(2), np.array([[1.0, 0.0]]), np.ones(1), np.ones(1), 9) is None


def test_a_mixed_fleet_is_simulated_and_holds(tmp_path: Path) -> None:
    """Long prompts do not fit an L4; short ones are cheap there at these prices."""
    prices = tmp_path / "prices.toml"
    prices.write_text('date = "2026-11"\nh100-sxm = 12.0\nl4 = 0.4\n', encoding="utf-8")
    plan_spec = spec(
        workload={"rate_per_s": 60, "requests": 900,
                  "input_tokens": [[500, 0.5], [900, 0.97], [60_000, 1.0]]},
        slo={"ttft_p99_s": 25, "itl_p95_ms": 200},
        candidates={"gpus": ["h100-sxm", "l4"], "methods": ["full"], "mixed_fleets": True,
                    "max_gpus": 32},
        prices={"file": str(prices)},
    )  # fmt: skip
    plan = solved(plan_spec, details=False)
    assert plan.feasible
    mixed = [r for r in plan.rows if r["binds"] == "mix"]
    for row in mixed:
        assert row["feasible"]
        assert len(row["pools"]) > 1
        assert sum(p["share_of_requests"] for p in row["pools"]) == pytest.approx(1.0)
        small = next(p for p in row["pools"] if p["gpu"] == "l4")
        large = next(p for p in row["pools"] if p["gpu"] == "h100-sxm")
        assert small["input_tokens_max"] <= large["input_tokens_max"]
    assert mixed


def test_a_queue_that_only_grows_does_not_hold() -> None:
    """Few gaps of an answer that waits for a decode replica are long, so no percentile sees it."""
    alone = np.array([2.0])
    fine = outcome([0.0, 100.0], [1.0, 101.0], [5.0, 106.0], [[1.0, 1.0, 0.0, 1, 1]])
    assert backlog(fine, alone) == []
    late = outcome([0.0, 100.0], [1.0, 101.0], [5.0, 150.0], [[1.0, 1.0, 0.0, 1, 1]])
    assert backlog(late, alone)[0].key == "backlog_s"
    assert not backlog(late, alone)[0].holds


# Parallelism inside a replica ----------------------------------------------------------------


def parts_of(**changes: object) -> Parts:
    plan_spec = spec(workload={"requests": 200})
    found = screen(candidate(**changes), plan_spec, plan_spec.demand.requests())
    assert found.parts is not None, found.reason
    return found.parts


def test_a_pipeline_holds_more_and_decodes_no_faster() -> None:
    one, two = parts_of(), parts_of(pp=2)
    assert two.pool > 2 * one.pool  # both hold half of the weights
    moved = 8 * 2000 * 131072.0
    # A token passes through all layers either way; a micro-batch has half of the sequences.
    assert two.steps.decode_s(8, moved) >= one.steps.decode_s(4, moved / 2)
    assert two.steps.decode_s(8, moved) < one.steps.decode_s(8, moved)
    assert two.bound.rate_per_s > 1.5 * one.bound.rate_per_s


@pytest.mark.parametrize("split", [{}, {"pp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}])
def test_memory_of_one_gpu_is_all_there_is(split: dict[str, int]) -> None:
    plan_spec = spec(workload={"requests": 200})
    found = screen(candidate(**split), plan_spec, plan_spec.demand.requests())
    of = binding(found)
    assert of["weights_bytes"] + of["kv_pool_bytes"] <= of["usable_bytes"]
    assert of["weights_bytes"] + of["kv_pool_bytes"] > 0.9 * of["usable_bytes"]


def test_uneven_stages_wait_for_the_longest() -> None:
    # 32 layers over 3 stages: 11, 11, 10, so each cycle takes 33/32 of an even one.
    one, three = parts_of(), parts_of(pp=3)
    ratio = three.steps.decode_s(1, 1e6) / one.steps.decode_s(1, 1e6 / 3)
    assert ratio == pytest.approx(33 / 32, rel=0.03)


def test_context_parallel_prefill_is_faster_for_one_prompt() -> None:
    one, four = parts_of(), parts_of(cp=4)
    prompt = np.array([20_000.0])
    fast = four.steps.mixing_s(prompt, 0 * prompt)[0] + four.steps.token_s(20_000)
    slow = one.steps.mixing_s(prompt, 0 * prompt)[0] + 20_000 * one.steps.token_s(8192) / 8192
    assert 3.0 < slow / fast <= 4.2


def test_experts_are_read_by_every_rank_once() -> None:
    moe = {"model": "qwen3-30b-a3b", "gpu": "h200-sxm"}
    one, two = parts_of(**moe), parts_of(**moe, ep=2)
    assert two.pool > one.pool  # half of the experts are elsewhere
    # At a large batch all experts are read: the rank with half of them reads half.
    big, half = one.steps.decode_s(200, 1e9), two.steps.decode_s(200, 1e9)
    assert half < big
