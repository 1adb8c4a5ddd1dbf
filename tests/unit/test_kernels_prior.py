"""The prior of a single kernel, and what it makes of devices and published runs."""

from dataclasses import replace

import numpy as np
import pytest

from costmodel.hardware import gpu_names, load_hardware
from costmodel.kernels.prior import prior_time, vector_peak
from costmodel.methods import method_names
from costmodel.operation import Operation
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload


def test_elementwise_work_runs_at_the_fp32_rate() -> None:
    a100 = load_hardware("a100-sxm-80gb")
    assert vector_peak(a100) == 19.5e12
    bare = replace(a100, peak_flops_per_s={"bf16": 312e12})
    assert vector_peak(bare) == 19.5e12
    assert vector_peak(replace(a100, peak_flops_per_s={"fp8": 32e12})) == 2e12


def test_time_of_a_copy() -> None:
    # 2.039 GB through an A100 (2.039 TB/s): 1 ms at the datasheet, 1.5 us to start
    op = Operation(name="copy", kind="elementwise", workspace_bytes=2.039e9)
    t = prior_time(op, load_hardware("a100-sxm-80gb"))
    assert float(t.mid_s) == pytest.approx(1e-3 / 0.75 + 1.5e-6)
    assert float(t.low_s) >= 1e-3
    assert t.launch_s == 1.5e-6


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_method_on_every_device(gpu: str) -> None:
    """Devices lack peaks (fp32 on TPUs, bf16 on Apple's GPUs): no method may ask for them."""
    hardware, architecture = load_hardware(gpu), load_architecture("llama-2-7b")
    dtype = "bf16" if "bf16" in hardware.peak_flops_per_s else "fp16"
    for method in method_names():
        for level in ("ideal", "reference"):
            p = predict(
                architecture,
                method,
                Workload.of(1, 20_000),
                hardware,
                dtype=dtype,
                level=level,
                solve=False,  # type: ignore[arg-type]
            )
            assert np.isfinite(p["ttft_s"])
            assert np.isfinite(p["tpot_s"])


@pytest.mark.parametrize(
    ("context", "published_s"),
    [(100_000, 13.991), (200_000, 26.813), (300_000, 41.09), (500_000, 66.277)],
)
def test_sparse_prefill_of_the_published_implementation(context: int, published_s: float) -> None:
    """MInference README: Llama-3-8B-1048k on one A100-80GB (microsoft/MInference@fb56c91)."""
    p = predict(
        load_architecture("llama-3-8b-gradient-1048k"),
        "minference",
        Workload.of(1, context, 1),
        load_hardware("a100-sxm-80gb"),
        level="reference",
        solve=False,
    )
    assert p["ttft_low_s"] < published_s < p["ttft_high_s"]
