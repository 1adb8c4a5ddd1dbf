"""Anchors: one factor per phase, taken from runs, on top of what a profile says."""

from pathlib import Path

import pytest

import measure
from costmodel.errors import ConfigError, UnknownNameError
from costmodel.hardware import load_hardware
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload
from lccost.anchoring import anchored_profile

DEMO = Path(measure.__file__).parent / "data" / "demo-decoder.json"
PROFILE = """
name = "mine"
title = "mine"
vendor = ""
generation = "cpu"
is_cpu = true
n_units = 1
hbm_bytes_per_s = 1e10
memory_bytes = 1e10
[peak_flops_per_s]
bf16 = 1e12
fp32 = 1e11
[sources]
peak_flops_per_s = "made up for this test"
hbm_bytes_per_s = "made up for this test"
memory_bytes = "made up for this test"
n_units = "made up for this test"
[confidence]
peak_flops_per_s = "inferred"
hbm_bytes_per_s = "inferred"
memory_bytes = "inferred"
n_units = "inferred"
"""


def times(path):
    p = predict(
        load_architecture(DEMO), "full", Workload.of(1, 1000, 8), load_hardware(path), dtype="bf16"
    )
    return float(p["ttft_s"]), float(p["tpot_s"]), p.basis


def record(ttft_s, tpot_s, **changes):
    return {
        "record_key": "k", "model": str(DEMO), "method_spec": "full", "batch": 1,
        "context_tokens": 1000, "output_tokens": 8, "dtype": "bf16", "status": "ok",
        "is_valid": True, "ttft_s": ttft_s, "tpot_s": tpot_s, **changes,
    }  # fmt: skip


def test_one_factor_per_phase_scales_every_prediction(tmp_path):
    path, anchored = tmp_path / "mine.toml", tmp_path / "anchored.toml"
    path.write_text(PROFILE)
    ttft, tpot, basis = times(path)
    assert basis == "prior"
    runs = [
        record(2 * ttft, 1.5 * tpot),
        record(8 * ttft, 1.5 * tpot),
        record(99 * ttft, 99 * tpot, status="noisy"),
        record(None, None),
    ]
    anchored.write_text(anchored_profile(path, runs))
    # The geometric mean of 2 and 8 is 4.
    assert load_hardware(anchored).anchors == pytest.approx({"prefill": 4.0, "decode": 1.5})
    found = times(anchored)
    assert found[:2] == pytest.approx((4 * ttft, 1.5 * tpot), rel=1e-4)
    assert found[2] == "anchored"
    # Anchoring again starts from the profile itself, not from what was anchored.
    again = anchored_profile(anchored, [record(3 * ttft, tpot)])
    anchored.write_text(again)
    assert load_hardware(anchored).anchors == pytest.approx({"prefill": 3.0, "decode": 1.0})


def test_a_bundled_profile_is_anchored_by_its_name(tmp_path):
    ttft, tpot, _ = times("h100-sxm")
    text = anchored_profile("h100-sxm", [record(2 * ttft, 3 * tpot)])
    (tmp_path / "mine.toml").write_text(text)
    assert times(tmp_path / "mine.toml")[:2] == pytest.approx((2 * ttft, 3 * tpot), rel=1e-4)
    with pytest.raises(UnknownNameError, match="h100-sxm"):
        anchored_profile("h100-sxmm", [record(1.0, 1.0)])


def test_nothing_valid_is_an_error(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE)
    with pytest.raises(ConfigError, match="at least one record"):
        anchored_profile(path, [record(1.0, 1.0, is_valid=False)])


def test_unknown_phases_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE + "[anchors]\nattention = 2.0\n")
    with pytest.raises(ConfigError, match=r"anchors\.attention"):
        load_hardware(path)
