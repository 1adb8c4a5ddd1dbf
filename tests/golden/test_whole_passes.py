"""Default predictions against whole passes that others published, and what they rest on."""

import numpy as np
import pytest

from costmodel.hardware import load_hardware
from costmodel.in_situ import in_situ
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

#: (model, prompt tokens, seconds to the first token) on one A100 80 GB.
#: microsoft/MInference README, "FlashAttention-2" columns: transformers, then vLLM.
PREFILL = [
    ("llama-3-8b", 100_000, 24.883),
    ("llama-3-8b", 300_000, 169.624),
    ("llama-3-8b", 500_000, 456.784),
    ("llama-3-8b", 1_000_000, 1765.56),
    ("llama-3-8b", 10_000, 0.83215),
    ("llama-3-8b", 50_000, 7.71675),
]
#: (model, tp, tokens per second) on A100 80 GB, bf16, prompt of 5, 200 generated: gpt-fast README.
DECODE = [("llama-3.1-8b", 1, 93.89), ("llama-3.1-8b", 2, 149.03), ("llama-3.1-70b", 4, 37.45)]


@pytest.mark.parametrize(("model", "tokens", "seconds"), PREFILL)
def test_prefill_with_flash_attention_2(model: str, tokens: int, seconds: float) -> None:
    p = predict(
        load_architecture(model),
        "full",
        Workload.of(1, tokens),
        load_hardware("a100-sxm-80gb"),
        solve=False,
    )
    assert p.basis == "calibrated"
    assert p["ttft_low_s"] <= seconds <= p["ttft_high_s"]
    assert p["ttft_s"] == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize(("model", "tp", "rate"), DECODE)
def test_decode_of_a_compiled_model(model: str, tp: int, rate: float) -> None:
    p = predict(
        load_architecture(model),
        "full",
        Workload.of(1, 105),
        load_hardware("a100-sxm-80gb"),
        tp=tp,
        engine="gpt-fast",
        solve=False,
    )
    assert p["tpot_low_s"] <= 1.0 / rate <= p["tpot_high_s"]


@pytest.mark.parametrize(
    ("gpu", "basis"),
    [
        ("a100-sxm-80gb", "calibrated"),
        ("h100-sxm", "calibrated"),
        ("b200-sxm", "calibrated"),
        ("l40s", "calibrated"),
        ("h200-sxm", "transferred"),
        ("b300-sxm", "transferred"),
        ("l4", "transferred"),
        ("rtx-4090", "transferred"),
        ("t4", "transferred"),
        ("mi300x", "prior"),
        ("tpu-v5e", "prior"),
        ("epyc-9654", "prior"),
    ],
)
def test_the_default_says_what_it_rests_on(gpu: str, basis: str) -> None:
    hardware = load_hardware(gpu)
    dtype = "bf16" if "bf16" in hardware.peak_flops_per_s else "fp16"
    p = predict(
        *(load_architecture("llama-3.1-8b"), "full", Workload.of(1, 8192), hardware),
        dtype=dtype,
        solve=False,
    )
    assert p.basis == basis


def test_intervals_widen_with_the_distance_of_the_kernels() -> None:
    def width(gpu: str) -> float:
        p = predict(
            *(load_architecture("llama-3.1-8b"), "full", Workload.of(1, 32768)),
            load_hardware(gpu),
            dtype="fp16",
            solve=False,
        )
        return float((p["ttft_high_s"] - p["ttft_low_s"]) / p["ttft_s"])

    own, sister, other = width("h100-sxm"), width("h200-sxm"), width("t4")
    assert own < sister < other


def test_factors_are_those_of_passes() -> None:
    known = in_situ()
    assert 1.0 < known.compute_factor < 1.5
    assert 0.8 < known.memory_factor("gemm") < 1.2
    low, high = known.interval()
    assert np.log(high) == pytest.approx(-np.log(low)) == pytest.approx(np.log(5) * known.scatter)
    wider_low, wider_high = known.interval(0.4)
    assert wider_low == pytest.approx(np.exp(-np.hypot(np.log(low), 0.4)))
    assert wider_high == pytest.approx(np.exp(np.hypot(np.log(high), 0.4)))
