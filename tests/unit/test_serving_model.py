"""Engines under load: parts of a step by hand, and what must hold whatever the parameters."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import load_architecture, load_hardware
from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.intervals import factors, scatter_of
from costmodel.serving import Deployment, Load, Served, load_engine_times, metric
from costmodel.serving.engine_times import known_engines
from costmodel.serving.fit import in_first_half, row_key
from costmodel.serving.judging import Judged, scatter_at, scatter_by_class
from costmodel.serving.metrics import roofline_s
from costmodel.serving.stored import stored_as
from costmodel.weights import weights_bytes

H100 = load_hardware("h100-sxm")
B200 = load_hardware("b200-sxm")
LLAMA = load_architecture("llama-3.1-8b")
MIXTRAL = load_architecture("mixtral-8x7b")
R1 = load_architecture("deepseek-r1")


def load(concurrency: float, prompt: float = 1024, output: float = 1024) -> Load:
    return Load(
        concurrency=np.array([concurrency]),
        input_tokens=np.array([prompt]),
        output_tokens=np.array([output]),
    )


def seconds(kind: str, served: Served, at: Load, engine: str = "vllm") -> float:
    times = load_engine_times(engine)
    return float(np.ravel(metric(kind, times, served, at)(times.of(served)))[0])


def test_experts_of_one_gpu_by_hand() -> None:
    """Mixtral, 8 experts of 3 x 4096 x 14336, 2 chosen; batch 1 reads two: 704.6 MB a layer.

    32 layers over 3.35 TB/s are 6.731 ms on one GPU; experts spread over two GPUs or their width
    halved, each GPU has half of it.
    """
    one = Served.of(MIXTRAL, H100, "vllm").step(1.0, 128.0)
    assert float(one.expert_s) == pytest.approx(6.731e-3, rel=1e-3)
    for deployment in (Deployment(tp=2, moe_tp=2), Deployment(tp=2, ep=2)):
        half = Served.of(MIXTRAL, H100, "vllm", deployment=deployment).step(1.0, 128.0)
        assert float(half.expert_s) == pytest.approx(6.731e-3 / 2, rel=1e-3)


def test_weights_of_a_gpu_do_not_depend_on_how_experts_spread() -> None:
    whole = Served.of(MIXTRAL, H100, "vllm").weights_bytes
    assert whole == weights_bytes(MIXTRAL, "checkpoint")
    by_width = Served.of(MIXTRAL, H100, "vllm", deployment=Deployment(tp=4, moe_tp=4))
    by_group = Served.of(MIXTRAL, H100, "vllm", deployment=Deployment(tp=4, ep=4))
    assert by_width.weights_bytes == pytest.approx(by_group.weights_bytes, rel=1e-9)
    assert by_width.weights_bytes < whole / 3


def test_attention_ranks_hold_all_heads_and_exchange_tokens() -> None:
    tensor = Served.of(R1, B200, "sglang", deployment=Deployment(tp=8, moe_tp=8)).step(64.0, 1024.0)
    ranks = Served.of(R1, B200, "sglang", deployment=Deployment(tp=1, dp=8, ep=8)).step(
        64.0, 1024.0
    )
    assert float(ranks.matmul_s) > float(tensor.matmul_s)  # every rank reads all of attention
    assert float(ranks.collective_s) > 0


@pytest.mark.parametrize(
    ("precision", "bytes_per_parameter"), [("bf16", 2.0), ("fp8", 1.0), ("fp4", 0.5625)]
)
def test_precisions_store_matrices_so(precision: str, bytes_per_parameter: float) -> None:
    stored, weight_dtype = stored_as(LLAMA, precision)
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14_336)
    rest = 2 * 128_256 * 4096 * 2 + 65 * 4096 * 2  # embeddings, head and norms in 16 bits
    expected = matrices * bytes_per_parameter + rest
    assert weights_bytes(stored, weight_dtype) == pytest.approx(expected, rel=1e-4)


def test_fp4_of_a_sparse_model_leaves_attention_alone() -> None:
    stored, weight_dtype = stored_as(MIXTRAL, "fp4")
    experts = 32 * 8 * 3 * 4096 * 14_336
    attention = 32 * (4096 * 6144 + 4096 * 4096)
    rest = 2 * 32_000 * 4096 * 2
    expected = experts * 0.5625 + attention * 2 + rest
    assert weights_bytes(stored, weight_dtype) == pytest.approx(expected, rel=2e-3)


def test_a_checkpoint_keeps_its_own_format() -> None:
    assert stored_as(R1, "fp8") == (R1, "checkpoint")
    oss = load_architecture("gpt-oss-120b")
    assert stored_as(oss, "fp4") == (oss, "checkpoint")
    with pytest.raises(ConfigError, match="ternary"):
        stored_as(LLAMA, "ternary")


def test_deployments_that_do_not_divide_are_refused() -> None:
    with pytest.raises(NotApplicableError):
        Served.of(LLAMA, H100, "vllm", deployment=Deployment(tp=5))
    with pytest.raises(NotApplicableError, match="ep = 3"):
        Served.of(MIXTRAL, H100, "vllm", deployment=Deployment(tp=3, ep=3))
    with pytest.raises(ConfigError, match="dp"):
        Deployment(dp=0)


@pytest.mark.parametrize("engine", known_engines())
def test_more_load_never_makes_a_token_faster(engine: str) -> None:
    served = Served.of(LLAMA, H100, "vllm")
    times = [seconds("tpot", served, load(c), engine) for c in (1, 2, 4, 8, 16, 32, 64)]
    assert all(b >= a * 0.999 for a, b in pairwise(times))


def test_one_request_waits_for_nobody() -> None:
    """At a concurrency of 1 the time per token is the step's, whatever the prompt."""
    served = Served.of(LLAMA, H100, "vllm")
    assert seconds("tpot", served, load(1)) == pytest.approx(seconds("step", served, load(1)))


def test_others_prefill_stands_between_tokens() -> None:
    """Seven others with prompts of 8,192 are admitted once per 256 tokens of mine."""
    served = Served.of(LLAMA, H100, "vllm")
    times = load_engine_times("vllm")
    at = load(8, 8192, 256)
    between = seconds("tpot", served, at) - seconds("step", served, at)
    prompt = seconds("ttft", served, replace(at, concurrency=np.array([1.0])))
    fixed = times.parameters.start_s + times.parameters.step_s
    fixed += 32 * times.parameters.layer_s
    expected = times.parameters.prefill_share * 7 / 256 * (prompt - fixed)
    assert between == pytest.approx(expected, rel=1e-6)


def test_a_full_pool_caps_the_batch() -> None:
    """80 GB less 16 GB of weights hold 60 sequences of 8,192 + 512 tokens of 131,072 bytes."""
    served = Served.of(LLAMA, H100, "vllm")
    fits = float(np.ravel(served.most_sequences(np.array([8704.0]), 0.93))[0])
    expected = (85_029_027_840 * 0.93 - 16_060_522_496 - 289_910_292) / (8704 * 131_072)
    assert fits == pytest.approx(expected, rel=1e-3)
    most = load(200, 8192, 1024)
    more = load(400, 8192, 1024)
    assert seconds("tpot", served, most) == pytest.approx(seconds("tpot", served, more))


def test_packed_caches_gain_little_where_a_kernel_unpacks_them() -> None:
    """KIVI-4 in LMDeploy on an A6000, batch 16, 2,048 tokens: 4 % measured, 39 % by its bytes."""
    gpu, model = load_hardware("rtx-a6000"), load_architecture("llama-2-7b")
    times = load_engine_times("lmdeploy-pytorch")
    full = Served.of(model, gpu, "lmdeploy", dtype="fp16")
    kivi = Served.of(
        model, gpu, "lmdeploy", dtype="fp16", method="kivi:bits=4,group=32,residual_tokens=128"
    )
    plain, packed = (
        float(np.ravel(times.step_s(s, np.array([16.0]), np.array([2048.0])))[0])
        for s in (full, kivi)
    )
    assert 1.0 < plain / packed < 1.10
    roofline = roofline_s("step", full, load(16, 2048, 1)) / roofline_s(
        "step", kivi, load(16, 2048, 1)
    )
    assert float(np.ravel(roofline)[0]) > 1.3


@settings(max_examples=25, deadline=None)
@given(
    concurrency=st.integers(1, 512),
    prompt=st.integers(1, 32_768),
    output=st.integers(1, 4096),
    kind=st.sampled_from(["tpot", "step", "ttft", "run", "request", "offline"]),
)
def test_every_metric_is_finite_and_positive(
    concurrency: int, prompt: int, output: int, kind: str
) -> None:
    served = Served.of(LLAMA, H100, "vllm", deployment=Deployment(tp=2))
    value = seconds(kind, served, load(concurrency, prompt, output))
    assert 0 < value < 1e5


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(["llama-3.1-8b", "mixtral-8x7b", "deepseek-r1"]),
    gpu=st.sampled_from(["a100-sxm-80gb", "h100-sxm", "b200-sxm", "l40s", "h200-sxm", "rtx-a6000"]),
    engine=st.sampled_from([*known_engines(), "another"]),
    kind=st.sampled_from(["tpot", "step", "ttft", "run", "request", "offline"]),
    at=st.tuples(st.integers(1, 512), st.integers(1, 131_072), st.integers(1, 4096)),
    better=st.sampled_from(["hbm_bytes_per_s", "clock_hz", "link_bytes_per_s", "peak_flops_per_s"]),
    factor=st.floats(1.01, 3.0),
)
def test_a_better_device_is_never_slower(
    model: str,
    gpu: str,
    engine: str,
    kind: str,
    at: tuple[int, int, int],
    better: str,
    factor: float,
) -> None:
    here = load_hardware(gpu)
    rate = getattr(here, better)
    if rate is None:
        return
    more: Any = {k: v * factor for k, v in rate.items()} if better[:4] == "peak" else rate * factor
    slow, fast = (
        seconds(
            kind,
            Served.of(load_architecture(model), device, "vllm", deployment=Deployment(tp=8)),
            load(*at),
            engine,
        )
        for device in (here, replace(here, **{better: more}))
    )
    assert fast <= slow * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["tpot", "step", "ttft", "run", "request"])
@pytest.mark.parametrize("model", [LLAMA, MIXTRAL, R1])
def test_longer_prompts_never_take_less(model: Architecture, kind: str) -> None:
    served = Served.of(model, H100, "vllm", deployment=Deployment(tp=8))
    prompts = np.unique(np.geomspace(16, 262_144, 120).astype(int)).astype(float)
    at = Load(
        concurrency=np.full(prompts.shape, 1.0),
        input_tokens=prompts,
        output_tokens=np.full(prompts.shape, 128.0),
    )
    times = load_engine_times("sglang")
    taken = np.asarray(metric(kind, times, served, at)(times.of(served)))
    assert np.all(np.diff(taken) >= -1e-9 * taken[1:])


def test_engines_without_runs_take_the_pooled_parameters() -> None:
    unknown = load_engine_times("some-new-engine")
    assert unknown.basis("tpot_dense", "h100-sxm") == "transferred"
    assert unknown.parameters == load_engine_times("any").parameters
    vllm = load_engine_times("vllm")
    assert vllm.basis("tpot_dense", "h100-sxm") == "calibrated"
    assert vllm.basis("tpot_dense", "l4") == "transferred"


def test_a_gpu_without_runs_widens_the_interval() -> None:
    vllm = load_engine_times("vllm")
    (low, high), (wide_low, wide_high) = (
        vllm.interval("tpot_dense", np.float64(1.0), gpu) for gpu in ("h100-sxm", "l4")
    )
    assert wide_low < low < 1.0 < high < wide_high


def test_a_class_nobody_ran_errs_as_its_metric_and_as_its_models() -> None:
    pooled = load_engine_times("any")
    assert "ttft_sparse" not in pooled.scatter
    low, high = load_engine_times("vllm").interval("ttft_sparse", np.float64(1.0), "h100-sxm")
    sparse = max(s[""] for name, s in pooled.scatter.items() if name.endswith("sparse"))
    both = np.hypot(pooled.scatter["ttft_dense"][""], sparse)
    assert np.log(high) == pytest.approx(-np.log(low)) == pytest.approx(np.log(5) * both)


@pytest.mark.parametrize("draw", ["laplace", "normal"])
def test_intervals_hold_four_in_five_whatever_the_shape_of_the_errors(draw: str) -> None:
    rng = np.random.default_rng(0)
    errors = getattr(rng, draw)(0.0, 0.1, 20_000)
    low, high = factors(scatter_of(errors, wider=0.5))
    assert np.mean((np.exp(errors) > low) & (np.exp(errors) < high)) == pytest.approx(0.8, abs=0.01)


def test_few_rows_lean_on_the_group_around_them() -> None:
    """No row: the group's own; four rows of 0.1 and a group of 0.3: half way."""
    assert scatter_of(np.empty(0), wider=0.3) == 0.3
    assert scatter_of(np.array([0.1, -0.1, 0.1, -0.1]), wider=0.3) == pytest.approx(0.2)
    # twice the same rows predicted by two fits are no more rows
    assert scatter_of(np.full((2, 4), 0.1), wider=0.3) == pytest.approx(0.2)


def judged_runs() -> Judged:
    """Two GPUs of one class: errors of 0.1 on the first, of 0.4 on the second, 8 runs each."""
    size = np.repeat([0.1, 0.4], 8)
    return Judged(
        predicted_s=np.exp(size * np.tile([1.0, -1.0], 8))[None, :],
        observed_s=np.ones(16),
        roofline_s=np.ones(16),
        metric_class=np.full(16, "tpot_dense"),
        hardware=np.repeat(["a", "b"], 8),
        inside=np.full((1, 16), np.nan),
        width=np.full((1, 16), np.nan),
    )


def test_scatter_goes_by_class_and_gpu() -> None:
    judged = judged_runs()
    scatter = scatter_by_class(judged)
    whole = scatter["tpot_dense"][""]
    everywhere = (16 * 0.25 + 4 * 0.2) / 20  # an engine nobody judged is a fifth off
    assert whole == pytest.approx((16 * 0.25 + 4 * everywhere) / 20)
    assert scatter["tpot_dense"]["a"] == pytest.approx((8 * 0.1 + 4 * whole) / 12)
    assert scatter["tpot_dense"]["b"] == pytest.approx((8 * 0.4 + 4 * whole) / 12)
    every = np.ones(16, dtype=bool)
    assert scatter_at(scatter, judged, every)[0] == scatter["tpot_dense"]["a"]
    other = replace(judged, hardware=np.full(16, "c"))
    assert scatter_at(scatter, other, every)[0] == whole


def test_runs_left_out_together_count_as_one() -> None:
    judged = judged_runs()
    scatter = scatter_by_class(judged, judged.hardware)
    everywhere = (2 * 0.25 + 4 * 0.2) / 6
    assert scatter["tpot_dense"] == {"": pytest.approx((2 * 0.25 + 4 * everywhere) / 6)}


def test_a_run_is_on_one_side_of_a_split_however_often_it_is_listed() -> None:
    row = {"id": "a", "isl": "1024", "tp_size": "4", "silicon_tpot_ms": "12.1"}
    again = {**row, "id": "b", "silicon_tpot_ms": "13.0"}
    assert row_key(row) == row_key(again)
    sides = {in_first_half(row_key({**row, "isl": str(i)}), 0) for i in range(50)}
    assert sides == {True, False}
