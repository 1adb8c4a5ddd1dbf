"""Seconds of attention kernels, worked by hand, and what holds for every shipped family."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.hardware import load_hardware
from costmodel.kernels.decode_attention import (
    DecodeAttentionParameters,
    decode_attention_time_s,
)
from costmodel.kernels.families import shipped_families
from costmodel.kernels.kinds import kernel_kind
from costmodel.kernels.mla import (
    MlaDecodeParameters,
    MlaPrefillParameters,
    mla_decode_time_s,
    mla_prefill_time_s,
)
from costmodel.kernels.prefill_attention import (
    PrefillAttentionParameters,
    prefill_attention_time_s,
)
from tests.unit.test_kernels_physics import device

DECODE = DecodeAttentionParameters(
    launch_s=1e-5,
    bandwidth_fraction=0.5,
    stream_bytes_per_s=1e11,
    fp8_stream_ratio=0.5,
    cta_s=1e-6,
    wave_rounding=1.0,
    ctas_per_unit=1.0,
    split_ctas_per_unit=1.0,
    max_splits=50.0,
    block_tokens=100.0,
    combine_s=2e-6,
    fp8_s=3e-6,
    cache_rate_fraction=1e9,
    cache_fraction=1.0,
    unhidden_fraction=0.0,
)
PREFILL = PrefillAttentionParameters(
    launch_s=1e-5,
    tensor_fraction=1.0,
    fp8_ratio=1.0,
    exponentials_per_s=1e18,
    unhidden_exponential=0.0,
    wide_head_cost=1.0,
    masked_fraction=0.0,
    cta_s=0.0,
    wave_rounding=0.0,
    encoder_wave_rounding=0.0,
    bandwidth_fraction=1.0,
    append_fraction=1e9,
    append_token_s=0.0,
    unhidden_fraction=0.0,
    cache_fraction=1.0,
    cache_rate_fraction=1.0,
    fp8_s=0.0,
    fp8_passes=0.0,
)


def test_decode_of_a_large_batch_is_bound_by_dram() -> None:
    # 200 sequences x 8 heads x 2 x 4096 x 128 x 2 bytes = 3.355 GB at half of 1 TB/s = 6710.9 us.
    # 1,600 units on 100 SMs: 16 rounds of 2.097 MB / 100 GB/s + 1 us = 351.5 us: hidden.
    t = decode_attention_time_s(DECODE, device(), 200, 4096, 32, 8, 128)
    assert t == pytest.approx(1e-5 + 3.3554432e9 / 0.5e12, rel=1e-6)


def test_decode_splits_one_long_sequence_over_the_machine() -> None:
    # One unit, 100 SMs: at most 50 splits. 2 x 131072 x 128 x 2 = 67.1 MB over 50 CTAs at 100 GB/s
    # = 13.42 us + 1 us; DRAM takes 134.2 us and hides it. The joining kernel: 2 us x (1 - 1/50).
    t = decode_attention_time_s(DECODE, device(), 1, 131072, 8, 1, 128)
    assert t == pytest.approx(1e-5 + 67108864 / 0.5e12 + 2e-6 * 0.98, rel=1e-6)


def test_decode_without_splits_streams_through_one_cta() -> None:
    # FlashAttention-2 with one query head per KV head: 67.1 MB at 100 GB/s = 671 us, no joining.
    flat = replace(DECODE, swaps_heads=1.0)
    t = decode_attention_time_s(flat, device(), 1, 131072, 1, 1, 128)
    assert t == pytest.approx(1e-5 + 67108864 / 1e11 + 1e-6, rel=1e-6)
    grouped = decode_attention_time_s(flat, device(), 1, 131072, 8, 1, 128)
    assert grouped < t


def test_swapped_heads_copy_with_several_kv_heads_and_stand_alone_in_a_window() -> None:
    flat = replace(DECODE, swaps_heads=1.0)
    one = decode_attention_time_s(flat, device(), 4, 64, 16, 1, 128)
    two = decode_attention_time_s(flat, device(), 4, 64, 16, 2, 128)
    assert two - one == pytest.approx(2e-6, rel=0.02)  # the copy; both are a single round
    # 16 heads x 8 sequences = 128 CTAs on 100 SMs: two rounds of 2 x 128 x 128 x 2 / 100e9 + 1 us.
    windowed = decode_attention_time_s(flat, device(), 8, 4096, 16, 2, 128, window=128)
    assert windowed == pytest.approx(1e-5 + 2 * (65536 / 1e11 + 1e-6), rel=1e-6)


def test_groups_above_32_start_later() -> None:
    wide = replace(DECODE, wide_s=4e-6)
    for heads, more in ((32, 0.0), (33, 4e-6), (64, 4e-6)):
        t = [decode_attention_time_s(p, device(), 200, 4096, heads, 1, 128) for p in (wide, DECODE)]
        assert t[0] - t[1] == pytest.approx(more, abs=1e-12), heads


def test_small_groups_of_flashinfer_run_in_cheaper_ctas() -> None:
    # 512 sequences x 8 KV heads = 4,096 units: 41 rounds on 100 SMs, 1 us per CTA or half of that.
    flashinfer = replace(DECODE, plain_group=4.0, plain_cta_ratio=0.5, unhidden_fraction=1.0)
    for group, width, rounds in ((2, 2.0, 41), (4, 2.0, 0), (2, 1.0, 0)):
        plain, usual = (
            decode_attention_time_s(p, device(), 512, 16, 8 * group, 8, 128, width)
            for p in (flashinfer, replace(flashinfer, plain_group=0.0))
        )
        assert usual - plain == pytest.approx(rounds * 0.5e-6, abs=1e-12), (group, width)


def test_decode_fp8_reads_half_and_starts_later() -> None:
    t = decode_attention_time_s(DECODE, device(), 200, 4096, 32, 8, 128, 1.0)
    assert t == pytest.approx(1e-5 + 3e-6 + 1.6777216e9 / 0.5e12, rel=1e-6)


def test_decode_window_reads_the_window_only() -> None:
    windowed = decode_attention_time_s(DECODE, device(), 200, 65536, 32, 8, 128, window=4096)
    assert windowed == decode_attention_time_s(DECODE, device(), 200, 4096, 32, 8, 128)


def test_warm_decode_of_a_cached_set_skips_dram() -> None:
    # 4.2 MB fit a 10 MB cache whose rate is set beyond measure: only CTAs and launch remain.
    cold = decode_attention_time_s(DECODE, device(), 1, 1024, 32, 8, 128)
    warm = decode_attention_time_s(DECODE, device(), 1, 1024, 32, 8, 128, cold=False)
    assert cold - warm > 1e-6


def test_prefill_runs_at_peak_over_the_pairs_its_tiles_cover() -> None:
    # 32 heads, 16384 queries, D 128: per head 16384 x (8192 + 128/2 + 128/2) pairs covered,
    # 512 FLOPs each: 16384 x 8320 x 32 x 512 / 1e14 = 22.33 ms.
    t = prefill_attention_time_s(PREFILL, device(), 1, 16384, 32, 8, 128)
    assert t == pytest.approx(1e-5 + 16384 * 8320 * 32 * 512 / 1e14, rel=1e-6)


def test_a_short_machine_waits_for_the_longest_tile() -> None:
    # One head, 4096 queries: 32 tiles on 100 SMs; the last walks 4096 keys:
    # 128 x 4096 pairs x 512 FLOPs on one SM of 1 TFLOP/s = 268.4 us.
    t = prefill_attention_time_s(PREFILL, device(), 1, 4096, 1, 1, 128)
    assert t == pytest.approx(1e-5 + 128 * 4096 * 512 / 1e12, rel=1e-6)


def test_a_window_shortens_the_walk() -> None:
    # W 1024 of 16384 queries: ramp 1024 x 512, then 15360 x 1024 pairs; mean keys 992 + 128.
    t = prefill_attention_time_s(PREFILL, device(), 1, 16384, 32, 8, 128, window=1024)
    assert t == pytest.approx(1e-5 + 16384 * (992 + 128) * 32 * 512 / 1e14, rel=1e-6)
    masked = replace(PREFILL, masked_fraction=1.0)
    full = prefill_attention_time_s(PREFILL, device(), 1, 16384, 32, 8, 128)
    assert prefill_attention_time_s(
        masked, device(), 1, 16384, 32, 8, 128, window=1024
    ) == pytest.approx(float(full))


def test_new_keys_and_values_are_appended_to_the_cache() -> None:
    # 16384 tokens at 1 ns, and 16384 x 8 x 256 x 2 bytes read and written at half of 1 TB/s.
    appending = replace(PREFILL, append_fraction=0.5, append_token_s=1e-9)
    without = prefill_attention_time_s(PREFILL, device(), 1, 16384, 32, 8, 128)
    t = prefill_attention_time_s(appending, device(), 1, 16384, 32, 8, 128)
    assert t - without == pytest.approx(16384e-9 + 2 * 16384 * 8 * 256 * 2 / 0.5e12, rel=1e-6)


def test_an_encoder_sees_every_key() -> None:
    t = prefill_attention_time_s(PREFILL, device(), 8, 2048, 16, 16, 64, causal=0.0)
    assert t == pytest.approx(1e-5 + 8 * 16 * 2048 * 2048 * 256 / 1e14, rel=1e-6)


def test_head_sizes_run_padded_to_32() -> None:
    odd = prefill_attention_time_s(PREFILL, device(), 8, 2048, 16, 16, 72, causal=0.0)
    padded = prefill_attention_time_s(PREFILL, device(), 8, 2048, 16, 16, 96, causal=0.0)
    assert odd == pytest.approx(float(padded))


def test_narrow_heads_may_run_in_taller_tiles_and_wide_ones_in_lower() -> None:
    # 50 sequences of 384 queries, 2 heads: 3 tiles of 128 rows, 2 of 192, 6 of 64; 1 us each.
    flat = replace(PREFILL, tensor_fraction=1e6, cta_s=1e-6, bandwidth_fraction=1e6)
    tall = replace(flat, slim_rows=192.0)
    for parameters, head_dim, tiles in (
        (flat, 64, 3),
        (tall, 64, 2),
        (tall, 96, 2),
        (tall, 128, 3),
    ):
        t = prefill_attention_time_s(
            parameters, device(peak_flops_per_s={"bf16": 1e30}), 50, 384, 2, 2, head_dim, cold=False
        )
        assert t - 1e-5 == pytest.approx(50 * 2 * tiles / 100 * 1e-6, rel=0.01), head_dim


def test_a_single_query_is_one_tile_per_head_or_per_kv_head() -> None:
    # 100 sequences, 32 query heads on 4 KV heads: 32 or 4 tiles per SM.
    apart = replace(PREFILL, cta_s=1e-6, packs_heads=0.0, bandwidth_fraction=1e6)
    for swaps, tiles in ((1.0, 4), (0.0, 32)):
        parameters = replace(apart, swaps_heads=swaps)
        t = prefill_attention_time_s(parameters, device(), 100, 1, 32, 4, 128, cold=False)
        # Its 128 rows walk the diagonal and half a block of 128 keys, at 512 FLOPs a pair.
        per_tile = 1e-6 + 128 * (1 + 64) * 4 * 128 / 1e12
        assert t == pytest.approx(1e-5 + tiles * per_tile, rel=1e-3)


def test_exponentials_bind_narrow_heads() -> None:
    # 1e9 exponentials per SM and second against 256 FLOPs at 1 TFLOP/s per pair: 1 ns beats 0.256.
    slow = replace(PREFILL, exponentials_per_s=1e9)
    t = prefill_attention_time_s(slow, device(), 8, 2048, 16, 16, 64, causal=0.0)
    assert t == pytest.approx(1e-5 + 8 * 16 * 2048 * 2048 * 1e-9 / 100, rel=1e-6)


MLA = MlaDecodeParameters(
    launch_s=1e-5,
    bandwidth_fraction=0.5,
    tensor_fraction=1.0,
    stream_bytes_per_s=1e12,
    cta_s=0.0,
    wave_rounding=0.0,
    ctas_per_unit=1.0,
    max_splits=1000.0,
    block_tokens=64.0,
    combine_s=0.0,
    cache_rate_fraction=1e9,
    cache_fraction=1.0,
    unhidden_fraction=0.0,
)


def test_latent_decode_reads_one_latent_for_all_heads() -> None:
    # 100 sequences x 8192 x 576 x 2 bytes = 943.7 MB at 0.5 TB/s = 1887 us; 16 heads: products
    # 2 x 16 x 1088 FLOPs per token on 1 TFLOP/s = 34.8 ns x 8192 = 285 us: hidden.
    t = mla_decode_time_s(MLA, device(), 100, 8192, 16)
    assert t == pytest.approx(1e-5 + 100 * 8192 * 1152 / 0.5e12, rel=1e-6)


def test_latent_decode_of_many_heads_is_bound_by_tensor_cores() -> None:
    # 128 heads are two units of 64 rows: 200 units on 100 SMs, two rounds of
    # 8192 tokens x 2 x 64 x 1088 FLOPs / 1 TFLOP/s = 1140.9 us each.
    t = mla_decode_time_s(MLA, device(), 100, 8192, 128)
    assert t == pytest.approx(1e-5 + 2 * 8192 * 2 * 64 * 1088 / 1e12, rel=1e-6)


def test_a_converted_fp8_latent_is_read_in_bf16_after_it_was_converted() -> None:
    # 943.7 MB of bf16 as above, behind 100 x 8192 x 576 elements at 100 SMs x 1e9/s = 4718.6 us.
    converting = replace(MLA, converts_cache=1.0, convert_per_s=1e9, fp8_s=3e-6)
    t = mla_decode_time_s(converting, device(), 100, 8192, 16, 1.0)
    elements = 100 * 8192 * 576
    assert t == pytest.approx(1.3e-5 + elements / 1e11 + 2 * elements / 0.5e12, rel=1e-6)
    assert mla_decode_time_s(converting, device(), 100, 8192, 16) == mla_decode_time_s(
        MLA, device(), 100, 8192, 16
    )


def test_a_native_fp8_latent_is_half_the_bytes() -> None:
    t = mla_decode_time_s(MLA, device(), 100, 8192, 16, 1.0)
    assert t == pytest.approx(1e-5 + 100 * 8192 * 576 / 0.5e12, rel=1e-6)


def test_narrow_tiles_read_the_latent_once_per_16_heads_and_pairs_once_per_128() -> None:
    # Bound by what a CTA streams, 1152 bytes at 10 GB/s a token, whole rounds on 100 SMs; too many
    # sequences for the narrow tiles of small calls.
    slow = replace(MLA, stream_bytes_per_s=1e10, wave_rounding=1.0, bandwidth_fraction=1e6)
    gpu = device(peak_flops_per_s={"bf16": 1e17})
    narrow = replace(slow, narrow_tiles=1.0)
    one_round = 8192 * 1152 / 1e10
    for heads, of_slow, of_narrow in ((16, 1, 1), (32, 1, 2), (64, 1, 1), (128, 2, 1)):
        for parameters, rounds in ((slow, of_slow), (narrow, of_narrow)):
            t = mla_decode_time_s(parameters, gpu, 100, 8192, heads, cold=False)
            assert t == pytest.approx(1e-5 + rounds * one_round, rel=1e-3), heads


def test_small_calls_of_many_heads_run_in_narrow_tiles() -> None:
    # 5 sequences x 128 heads = 40 tiles of 16 heads on 100 SMs, over 512 tokens (1,024 at most):
    # 2.5 splits, and the products of 16 rows.
    bound = replace(MLA, narrow_tiles=1.0, wave_rounding=1.0, stream_bytes_per_s=1e18)
    t = mla_decode_time_s(bound, device(), 5, 512, 128, cold=False)
    assert t == pytest.approx(1e-5 + 512 / 2.5 * 2 * 16 * 1088 / 1e12, rel=1e-3)


def test_absorbed_prefill_costs_three_point_four_times_the_expanded() -> None:
    fields = {f: getattr(PREFILL, f) for f in PREFILL.__dataclass_fields__}
    expanded = MlaPrefillParameters(**fields)
    absorbed = MlaPrefillParameters(**{**fields, "absorbed": 1.0})
    a = mla_prefill_time_s(absorbed, device(), 1, 16384, 64) - 1e-5
    e = mla_prefill_time_s(expanded, device(), 1, 16384, 64) - 1e-5
    assert a / e == pytest.approx((576 + 512) / (192 + 128), rel=0.01)  # 3.4


def test_a_kernel_measured_absorbed_runs_an_operation_that_expands() -> None:
    absorbed = MlaPrefillParameters(
        **{f: getattr(PREFILL, f) for f in PREFILL.__dataclass_fields__}, absorbed=1.0
    )
    shape = {"batch": 1.0, "q_len": 16384.0, "n_heads": 64.0, "element_bytes": 2.0}
    kind = kernel_kind("mla_prefill_attention")
    measured = kind.time_s(absorbed, device(), shape, "", True) - 1e-5
    asked = kind.time_s(absorbed, device(), shape | {"absorbed": 0.0}, "", True) - 1e-5
    assert measured / asked == pytest.approx((576 + 512) / (192 + 128), rel=0.01)
    # 64 heads x 16384 x 16385 / 2 pairs x 640 FLOPs at 100 TFLOP/s, the diagonal tiles whole.
    assert asked == pytest.approx(64 * 16384 * 16385 / 2 * 640 / 1e14, rel=0.02)


KINDS = (
    "decode_attention",
    "prefill_attention",
    "mla_decode_attention",
    "mla_prefill_attention",
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(
    batch=st.integers(1, 512),
    tokens=st.integers(1, 10**6),
    group=st.sampled_from([1, 4, 8, 16]),
    kv_heads=st.sampled_from([1, 2, 8, 32]),
    dim=st.sampled_from([64, 128, 256]),
    width=st.sampled_from([1.0, 2.0]),
    gpu=st.sampled_from(["h100-sxm", "h200-sxm", "l4", "a100-sxm-80gb", "b200-sxm"]),
)
def test_no_shipped_family_predicts_below_the_roofline(
    kind: str, batch: int, tokens: int, group: int, kv_heads: int, dim: int, width: float, gpu: str
) -> None:
    hardware = load_hardware(gpu)
    shape = {
        "batch": batch,
        "q_len": tokens,
        "kv_len": tokens,
        "n_heads": group * kv_heads,
        "n_kv_heads": kv_heads,
        "head_dim": dim,
        "element_bytes": width,
        "window": 0.0,
        "causal": 1.0,
    }
    for family in shipped_families(kind):
        low, mid, high = family.time_s(hardware, shape)
        bound = family.kind.roofline_s(hardware, shape, family.variant)
        assert bound * (1 - 1e-12) <= low <= mid <= high


@pytest.mark.parametrize("kind", KINDS)
def test_time_grows_with_context_and_batch_in_every_shipped_family(kind: str) -> None:
    tokens = np.unique(np.round(np.geomspace(1, 2e5, 500)))
    batch = np.arange(1.0, 600.0)
    fixed = {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "window": 0.0, "causal": 1.0}
    for family in shipped_families(kind):
        for width in (1.0, 2.0):
            more = {**fixed, "element_bytes": width}
            for sweep in (
                {"batch": 4.0, "q_len": tokens, "kv_len": tokens},
                {"batch": batch, "q_len": 1024.0, "kv_len": 8192.0},
            ):
                t = family.kind.time_s(
                    family.parameters, load_hardware("h100-sxm"), more | sweep, family.variant, True
                )
                assert np.all(np.diff(t) >= -0.003 * t[1:]), (family.kernel, width)
