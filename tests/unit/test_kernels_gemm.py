"""Seconds of a matrix product, worked by hand, and what holds for any parameters."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.kernels.families import shipped_families
from costmodel.kernels.gemm import FP8_PRIORS, PRIORS, GemmParameters, gemm_time_s
from costmodel.kernels.physics import values
from tests.unit.test_kernels_physics import device

#: Nothing attained below the datasheet, no overheads, perfect sharing: easy arithmetic.
IDEAL = GemmParameters(
    launch_s=1e-6,
    bandwidth_fraction=1.0,
    tensor_fraction=1.0,
    stream_bytes_per_s=1e15,
    tile_s=0.0,
    wave_rounding=0.0,
    split_s=1.0,
    unhidden_fraction=0.0,
    cache_fraction=1.0,
    burst_gain=1e-9,
    raster_columns=1e9,
)


def test_compute_bound_product_runs_at_peak() -> None:
    # 4096^3 x 2 = 137.4 GFLOP at 100 TFLOP/s = 1374.4 us; bytes 100.7 MB = 100.7 us hide behind.
    # 32 x 32 = 1024 tiles of 128 x 128 on 100 SMs: more than one wave, shared perfectly.
    t = gemm_time_s(IDEAL, device(), 4096, 4096, 4096)
    assert t == pytest.approx(1e-6 + 1374.39e-6, rel=1e-4)


def test_one_row_runs_at_dram_rate() -> None:
    # Weights 8192 x 8192 x 2 = 134.2 MB, activations 16 KiB in and out: 134.25 us at 1 TB/s.
    # 64 tiles of 64 x 128 on 100 SMs: 64-row tiles, k = 8192 at 64 x 128 x 2 x 100 / 1e14 s each
    # = 134.2 us: about as long; both overlap.
    t = gemm_time_s(IDEAL, device(), 1, 8192, 8192)
    assert t == pytest.approx(1e-6 + 134.25e-6, rel=1e-3)


def test_a_partial_wave_costs_a_whole_one_when_waves_are_whole() -> None:
    # 101 tiles of 128 x 256 (m = 128 x 101 rows, n = 256) on 100 SMs need two rounds; smaller tiles
    # need 202 -> 3, 404 -> 5, 808 -> 9 rounds of a half, quarter, eighth: 2, 1.5, 1.25, 1.125.
    whole = replace(IDEAL, wave_rounding=1.0)
    d = device()
    rows, k = 128 * 101, 8192
    tile = 2 * 64 * 64 * k * 100 / 1e14
    assert gemm_time_s(whole, d, rows, 256, k) == pytest.approx(1e-6 + 9 * tile, rel=1e-9)


def test_split_k_fills_an_idle_machine() -> None:
    # One 64 x 64 tile, k = 16384: alone 134 us. Split 16 ways: 8.4 us, plus 1 us for the split,
    # plus partial sums 16 x 64 x 64 x 8 bytes at twice DRAM rate (0.26 us).
    d = device()
    alone = gemm_time_s(IDEAL, d, 64, 64, 16384)
    split = gemm_time_s(replace(IDEAL, split_s=1e-6), d, 64, 64, 16384)
    tile = 2 * 64 * 64 * 16384 * 100 / 1e14
    assert alone == pytest.approx(1e-6 + tile, rel=1e-6)
    assert split == pytest.approx(1e-6 + tile / 16 + 1e-6 + 16 * 64 * 64 * 8 / 2e12, rel=1e-6)


def test_writes_that_nothing_hides_and_waits_per_step_of_k_come_on_top() -> None:
    # C: 4096 x 4096 x 2 bytes at 1 TB/s = 33.55 us, of which half is not hidden.
    writing = replace(IDEAL, write_fraction=0.5)
    t = gemm_time_s(writing, device(), 4096, 4096, 4096)
    assert t == pytest.approx(1e-6 + 1374.39e-6 + 16.78e-6, rel=1e-4)
    # 4096 x 1 ns in each tile; with 128 x 256, 512 tiles go round 100 SMs 5.12 times.
    waiting = replace(IDEAL, step_s=1e-9)
    t = gemm_time_s(waiting, device(), 4096, 4096, 4096)
    assert t == pytest.approx(1e-6 + 1374.39e-6 + 5.12 * 4.096e-6, rel=1e-4)


def test_activations_larger_than_the_cache_are_read_again_per_group_of_columns() -> None:
    # A: 65536 x 2048 x 2 = 268 MB (cache 10 MB). n = 1280 = 10 tile columns; all 512 tile rows
    # exceed the SMs, so one column is visited at a time: A passes 10 times.
    d = device(peak_flops_per_s={"bf16": 1e18})
    p = replace(IDEAL, raster_columns=1.0, launch_s=0.0)
    a, b, c = 65536 * 2048 * 2, 2048 * 1280 * 2, 65536 * 1280 * 2
    assert gemm_time_s(p, d, 65536, 1280, 2048) == pytest.approx((10 * a + b + c) / 1e12, rel=1e-5)


def test_fp8_pays_for_quantising_its_activations() -> None:
    d = device()
    p = replace(IDEAL, quantise_row_s=1e-9, quantise_bandwidth_fraction=0.5)
    plain = gemm_time_s(IDEAL, d, 4096, 4096, 4096, "fp8")
    quantised = gemm_time_s(p, d, 4096, 4096, 4096, "fp8")
    base = 3 * 4096 * 4096 / (0.5e12)  # both read 2 and write 1 byte at half the bandwidth
    assert quantised - plain == pytest.approx(4096 * 1e-9, rel=1e-6)
    assert plain == pytest.approx(1e-6 + 2 * 4096**3 / 2e14 + base, rel=1e-3)


def test_warm_small_weights_come_from_the_cache() -> None:
    # Six copies of 512 KiB fit 10 MB: no DRAM. Cold, the same product reads them.
    d = device()
    cold = gemm_time_s(replace(IDEAL, launch_s=0.0), d, 1, 512, 512)
    warm = gemm_time_s(replace(IDEAL, launch_s=0.0), d, 1, 512, 512, cold=False)
    assert cold >= 524288 / 1e12
    assert warm < cold or warm == pytest.approx(cold)


def test_the_host_shows_only_in_tables_made_without_a_graph() -> None:
    eager = replace(IDEAL, eager_s=5e-4)
    assert gemm_time_s(eager, device(), 16, 512, 512, cold=False) == 5e-4
    assert gemm_time_s(eager, device(), 16, 512, 512) < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@given(
    m=st.integers(1, 10**6),
    n=st.integers(1, 10**5),
    k=st.integers(1, 10**5),
    seed=st.integers(0, 9),
)
def test_cold_is_never_below_the_roofline(dtype: str, m: int, n: int, k: int, seed: int) -> None:
    priors = FP8_PRIORS if dtype == "fp8" else PRIORS
    scatter = np.random.default_rng(seed).normal(0.0, 0.5, len(priors))
    p = GemmParameters(
        **{
            name: float(np.clip(v * np.exp(s), priors[name].low, priors[name].high))
            for (name, v), s in zip(values(priors).items(), scatter, strict=True)
        }
    )
    d = device()
    width = 1 if dtype == "fp8" else 2
    bound = max(2.0 * m * n * k / d.peak(dtype), (width * (m * k + n * k) + 2.0 * m * n) / 1e12)
    assert gemm_time_s(p, d, m, n, k, dtype) >= bound * (1 - 1e-12)


def test_a_scalar_is_an_array_of_one() -> None:
    m = np.array([1.0, 17.0, 300.0, 5000.0])
    together = gemm_time_s(IDEAL, device(), m, 4096, 1024)
    apart = [float(gemm_time_s(IDEAL, device(), x, 4096, 1024)) for x in m]
    assert np.asarray(together) == pytest.approx(apart, rel=1e-15)


def test_more_rows_never_take_less_time_in_any_shipped_family() -> None:
    m = np.unique(np.round(np.geomspace(1, 2e5, 800)))
    for family in shipped_families("gemm"):
        for n, k in ((4096, 4096), (512, 16384), (65536, 4096)):
            t = family.kind.time_s(
                family.parameters, device(), {"m": m, "n": n, "k": k}, family.variant, True
            )
            assert np.all(np.diff(t) >= -0.005 * t[1:]), family.kernel
