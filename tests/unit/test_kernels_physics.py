"""The pieces of the kernel models, against numbers worked by hand."""

import numpy as np
import pytest

from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels import physics


def device(**changes: object) -> HardwareProfile:
    """100 SMs at 1.8 GHz, 100 TFLOP/s bf16, 1 TB/s, 10 MB cache: numbers easy to divide by."""
    fields: dict[str, object] = {
        "name": "test",
        "title": "test",
        "vendor": "",
        "generation": "hopper",
        "n_units": 100,
        "peak_flops_per_s": {"bf16": 1e14, "fp8": 2e14},
        "hbm_bytes_per_s": 1e12,
        "memory_bytes": 8e10,
        "memory_marketing_bytes": 8e10,
        "l2_bytes": 1e7,
        "tdp_w": None,
        "link_bytes_per_s": 1e11,
        "host_link_bytes_per_s": None,
        "clock_hz": 1.8e9,
    }
    return HardwareProfile(**(fields | changes))  # type: ignore[arg-type]


def test_a_cache_in_two_partitions_holds_half_of_what_all_read() -> None:
    # GA100 and GH100 keep a copy per partition; GA102's 6 MB and Ada's 96 MB are of one piece.
    large = {g: device(generation=g, l2_bytes=4e7) for g in ("ampere", "ada", "hopper")}
    assert {g: physics.seen_cache_bytes(d) for g, d in large.items()} == {
        "ampere": 2e7, "ada": 4e7, "hopper": 2e7,
    }  # fmt: skip
    assert physics.seen_cache_bytes(device(generation="ampere", l2_bytes=6e6)) == 6e6


def test_a_set_half_the_cache_stays_and_twice_the_cache_misses() -> None:
    # z = 0.5: 2^-16 / (1 + 2^-16) = 1 / 65537; z = 2: 65536 / 65537; z = 1: one half.
    miss = physics.miss_fraction(np.array([5.0, 10.0, 20.0]), 10.0)
    assert miss == pytest.approx([1 / 65537, 0.5, 65536 / 65537], rel=1e-12)


def test_residency_survives_huge_sets() -> None:
    assert physics.miss_fraction(1e30, 1.0) == pytest.approx(1.0)


def test_waves_between_perfect_sharing_and_whole_rounds() -> None:
    assert physics.waves(2.25, 0.0) == 2.25
    assert physics.waves(2.25, 1.0) == 3.0
    assert physics.waves(2.25, 0.4) == pytest.approx(2.55)  # 2.25 + 0.75 x 0.4
    assert physics.waves(0.1, 1.0) == 1.0


def test_a_rounding_error_does_not_start_another_wave() -> None:
    assert physics.waves(1.0 + 2e-16, 1.0) == pytest.approx(1.0)


def test_overlap_keeps_the_longer_and_part_of_the_shorter() -> None:
    assert physics.overlapped(3.0, 2.0, 0.5) == 4.0
    assert physics.overlapped(2.0, 3.0, 0.0) == 3.0


def test_short_calls_run_faster() -> None:
    assert physics.burst_gain(0.0, 0.2, 1e-3) == pytest.approx(1.2)
    assert physics.burst_gain(1e-3, 0.2, 1e-3) == pytest.approx(1.2 / 1.1)
    assert physics.burst_gain(1e3, 0.2, 1e-3) == pytest.approx(1.0, abs=1e-6)


def test_limits_cold_by_dram_and_warm_by_cache() -> None:
    # 1e9 bytes: 1 ms of DRAM; cache 100 SMs x 64 B x 1.8 GHz = 11.52 TB/s: 86.8 us.
    d = device()
    assert physics.limited(0.0, 0.0, 1e14, 1e9, d, cold=True) == pytest.approx(1e-3)
    assert physics.limited(0.0, 0.0, 1e14, 1e9, d, cold=False) == pytest.approx(86.8e-6, rel=1e-3)
    assert physics.limited(0.0, 1e12, 1e14, 0.0, d, cold=False) == pytest.approx(1e-2)
    assert physics.limited(5.0, 1e12, 1e14, 1e9, d, cold=True) == 5.0


def test_missing_peaks_have_stand_ins() -> None:
    t4 = load_hardware("t4")
    assert physics.tensor_peak(t4, "bf16") == t4.peak("fp16")
    a100 = load_hardware("a100-sxm-80gb")
    assert physics.tensor_peak(a100, "fp8") == a100.peak("bf16")


def test_element_sizes() -> None:
    assert physics.element_bytes("fp8_block") == 1.0
    assert physics.element_bytes("bf16") == 2.0
