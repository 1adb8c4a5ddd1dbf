"""Properties every prediction must have, over models, methods, devices and workloads."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costmodel.errors import NotApplicableError
from costmodel.hardware import load_hardware
from costmodel.methods import method_names
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

MODELS = [
    "llama-3.1-8b",
    "gemma-2-9b",
    "deepseek-v3",
    "qwen3-next-80b-a3b",
    "mamba2-2.7b",
    "recurrentgemma-9b",
    "jamba-v0.1",
    "mixtral-8x7b-v0.1",
    "deepseek-v3.2",
]
GPUS = ["h100-sxm", "a100-sxm-80gb", "l4", "mi300x"]
METHODS = list(method_names())
contexts = st.lists(st.integers(1, 2**20), min_size=1, max_size=6)
#: Whose fitted families price operations; none named is the default engine.
ENGINES = [None, "vllm", "sglang", "lccost"]


@settings(max_examples=120, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    method=st.sampled_from(METHODS),
    gpu=st.sampled_from(GPUS),
    batch=st.integers(1, 64),
    tokens=contexts,
    level=st.sampled_from(["ideal", "reference"]),
    tp=st.sampled_from([1, 2, 8]),
    engine=st.sampled_from(ENGINES),
)
def test_nothing_is_below_its_floor(
    model: str,
    method: str,
    gpu: str,
    batch: int,
    tokens: list[int],
    level: str,
    tp: int,
    engine: str | None,
) -> None:
    hardware = load_hardware(gpu)
    try:
        p = predict(
            load_architecture(model),
            method,
            Workload.of(batch, tokens),
            hardware,
            level=level,  # type: ignore[arg-type]
            tp=tp,
            dtype="bf16",
            engine=engine,
            solve=False,
        )
    except NotApplicableError:
        return
    exact = 1 + 1e-9
    assert np.all(p["roofline_ttft_s"] <= p["ttft_low_s"] * exact)
    assert np.all(p["roofline_tpot_s"] <= p["tpot_low_s"] * exact)
    for name in ("ttft", "tpot"):
        assert np.all(p[f"{name}_low_s"] <= p[f"{name}_s"])
        assert np.all(p[f"{name}_s"] <= p[f"{name}_high_s"])
    # bytes between GPUs take their time on the link; Hopper's switch adds, and n + 1 parts do
    rate = hardware.link_bytes_per_s or hardware.host_link_bytes_per_s
    least = min(1.0, (tp + 1) / (2 * max(tp - 1, 1))) if gpu == "h100-sxm" else 1.0
    assert np.all(p["prefill_collective_bytes"] * least / rate <= p["ttft_low_s"] * exact)
    assert np.all(p["decode_collective_bytes"] * least / rate <= p["tpot_low_s"] * exact)
    assert np.all(p["peak_prefill_bytes"] >= p["weights_bytes"] + p["state_bytes"] * (1 - 1e-12))
    assert np.all(p["peak_decode_bytes"] >= p["weights_bytes"])
    assert np.all(p["state_allocated_bytes"] >= p["state_bytes"] * (1 - 1e-12))
    for name in (
        "state_bytes",
        "prefill_flops",
        "decode_flops",
        "decode_hbm_bytes",
        "tokens_per_s",
    ):
        assert np.all(np.isfinite(p[name])), name
        assert np.all(p[name] >= 0), name
    assert np.all(p["state_bytes"] == np.round(p["state_bytes"])), "bytes are whole"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["full", "fp8_kv", "h2o"])
@pytest.mark.parametrize(
    ("gpu", "engine"),
    [("h200-sxm", None), ("h200-sxm", "vllm"), ("a100-sxm-80gb", "lccost"), ("l4", "sglang")],
)
def test_time_grows_with_context_and_batch(
    model: str, method: str, gpu: str, engine: str | None
) -> None:
    tokens = np.unique(np.geomspace(16, 2**20, 200).astype(int))
    try:
        p = predict(
            load_architecture(model),
            method,
            Workload.of(np.array([1, 2, 8, 64])[:, None], tokens),
            load_hardware(gpu),
            engine=engine,
            solve=False,
        )
    except NotApplicableError:
        pytest.skip(f"{method} does not apply to {model}")
    for name in ("ttft_s", "tpot_s", "state_bytes", "peak_prefill_bytes", "prefill_flops"):
        # a scan works on whole blocks, so its share of one forward pass saws a little
        slack = 1e-3 if name == "peak_prefill_bytes" else 1e-9
        assert np.all(np.diff(p[name], axis=1) >= -slack * p[name][:, 1:]), name
        assert np.all(np.diff(p[name], axis=0) >= -slack * p[name][1:]), name


@settings(max_examples=150, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    gpu=st.sampled_from([*GPUS, "b200-sxm", "l40s", "rtx-4090", "h200-sxm", "t4"]),
    engine=st.sampled_from([*ENGINES, "trtllm", "transformers"]),
    tp=st.sampled_from([1, 4]),
    batch=st.integers(1, 512),
    tokens=contexts,
    better=st.sampled_from(["hbm_bytes_per_s", "clock_hz", "link_bytes_per_s", "peak_flops_per_s"]),
    factor=st.floats(1.01, 3.0),
)
def test_a_better_device_is_never_slower(
    model: str,
    gpu: str,
    engine: str | None,
    tp: int,
    batch: int,
    tokens: list[int],
    better: str,
    factor: float,
) -> None:
    """Whatever binds before and after, and between."""
    hardware = load_hardware(gpu)
    rate = getattr(hardware, better)
    if rate is None:
        return
    more = {k: v * factor for k, v in rate.items()} if better.startswith("peak") else rate * factor
    dtype = "bf16" if "bf16" in hardware.peak_flops_per_s else "fp16"
    call = partial(
        predict,
        load_architecture(model),
        "full",
        Workload.of(batch, tokens),
        engine=engine,
        tp=tp,
        dtype=dtype,
        solve=False,
    )
    here, there = call(hardware), call(replace(hardware, **{better: more}))
    for name in ("ttft_s", "tpot_s"):
        assert np.all(there[name] <= here[name] * (1 + 1e-9)), name


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    method=st.sampled_from([*METHODS, "kivi:bits=4", "flexgen:bits=2", "snapkv+kivi"]),
    # residuals, windows and budgets end between the short ones and the long ones
    tokens=st.lists(st.integers(1, 400) | st.integers(1, 2**20), min_size=1, max_size=6),
    batch=st.integers(1, 300),
    engine=st.sampled_from([*ENGINES, "lmdeploy", "transformers"]),
    level=st.sampled_from(["ideal", "reference"]),
    data=st.data(),
)
# one token is all residual, 300 are partly packed
@example("gemma-2-9b", "kivi:bits=4", [128, 1], 1, "vllm", "reference", None)
@example("llama-3.1-8b", "kivi:bits=4", [128, 300], 1, "torch", "ideal", None)
# a method that only runs beyond its budget, on a prompt beyond what was measured
@example("llama-3.1-8b", "h2o", [1, 70_000], 1, "vllm", "reference", None)
def test_scalar_call_equals_array_call(
    model: str,
    method: str,
    tokens: list[int],
    batch: int,
    engine: str | None,
    level: str,
    data: st.DataObject | None,
) -> None:
    """Every point of a sweep gets what it gets alone."""
    architecture, hardware = load_architecture(model), load_hardware("h100-sxm")
    call = partial(
        predict, architecture, method, hardware=hardware, engine=engine, level=level, solve=False
    )
    try:
        many = call(workload=Workload.of(batch, tokens))
    except NotApplicableError:
        return
    i = len(tokens) - 1 if data is None else data.draw(st.integers(0, len(tokens) - 1))
    one = call(workload=Workload.of(batch, tokens[i]))
    for name, values in one.metrics.items():
        np.testing.assert_allclose(values, many[name][i], rtol=1e-12, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    method=st.sampled_from(METHODS),
    gpu=st.sampled_from(GPUS),
    batch=st.integers(1, 40),
    context=st.integers(64, 2**18),
    fraction=st.floats(0.3, 1.0),
)
def test_solved_capacity_is_the_edge(
    model: str, method: str, gpu: str, batch: int, context: int, fraction: float
) -> None:
    """What is solved fits, and one more does not."""
    architecture, hardware = load_architecture(model), load_hardware(gpu)

    def run(b: float, c: float, solve: bool = False):  # type: ignore[no-untyped-def]
        return predict(
            architecture,
            method,
            Workload.of(b, c),
            hardware,
            dtype="bf16",
            memory_fraction=fraction,
            solve=solve,
        )

    try:
        p = run(batch, context, solve=True)
    except NotApplicableError:
        return
    most = float(p["max_batch"])
    if most >= 1:
        assert run(most, context)["fits"]
    assert not run(most + 1, context)["fits"] or most >= 2**24
    longest = float(p["max_context_tokens"])
    if longest >= 1 and np.isfinite(longest):
        assert run(batch, longest)["fits"]
        assert not run(batch, longest + 1)["fits"]
    assert bool(p["fits"]) == bool(float(p["min_gpus"]) == 1)
