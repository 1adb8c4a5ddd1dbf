"""Which family answers for a device and an engine, and what an operation asks of it."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from costmodel.errors import ConfigError
from costmodel.hardware import load_hardware
from costmodel.in_situ import in_situ
from costmodel.kernels import moe_tiles
from costmodel.kernels.families import (
    ENGINE_SPREAD,
    SISTER_SPREAD,
    Family,
    load_family,
    shipped_families,
)
from costmodel.kernels.fitted import fitted_time
from costmodel.kernels.interval import Interval, disagreement
from costmodel.kernels.kinds import kernel_class, kernel_kind, kind_names
from costmodel.kernels.moved import MOST_SUSTAINED, built_as, moved, place_of
from costmodel.operation import Operation, causal_pairs


def family(*args: object, **kwargs: object) -> Family:
    found = load_family(*args, **kwargs)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_same_gpu_and_engine_is_calibrated() -> None:
    f = family("gemm", "vllm", load_hardware("h100-sxm"), variant="bf16")
    assert (f.hardware, f.engine, f.basis, f.distance) == ("h100-sxm", "vllm", "calibrated", 0)


def test_a_sister_gpu_is_transferred_with_a_wider_interval() -> None:
    own = family("gemm", "sglang", load_hardware("h100-sxm"), variant="bf16")
    sister = family("gemm", "sglang", load_hardware("h200-sxm"), variant="bf16")
    assert (sister.hardware, sister.basis, sister.distance) == ("h100-sxm", "transferred", 1)
    assert sister.parameters == own.parameters
    assert sister.interval == own.interval.wider(SISTER_SPREAD)


def test_another_generation_takes_the_nearest_and_the_widest_interval() -> None:
    own = family("gemm", "vllm", load_hardware("a100-sxm-80gb"), variant="bf16")
    old = family("gemm", "vllm", load_hardware("t4"), variant="bf16")
    assert (old.hardware, old.basis, old.distance) == ("a100-sxm-80gb", "transferred", 2)
    assert old.interval == own.interval.wider(own.generation_spread)
    assert old.spread == own.generation_spread > SISTER_SPREAD


def test_fixed_times_of_a_transferred_kernel_are_cycles_and_its_host_s_are_not() -> None:
    slow = load_hardware("a100-sxm-80gb")
    own = family("scan", "sglang", slow, variant="conv_step")
    fast = replace(slow, name="a100-fast", clock_hz=2 * slow.clock_hz)
    there = family("scan", "sglang", fast, variant="conv_step")
    assert there.parameters.launch_s == pytest.approx(own.parameters.launch_s / 2)
    assert there.parameters.bandwidth_fraction == own.parameters.bandwidth_fraction
    product = family("gemm", "vllm", load_hardware("h100-sxm"), variant="fp8_block")
    faster = replace(load_hardware("h100-sxm"), name="h100-fast", clock_hz=2 * 1.83e9)
    there = family("gemm", "vllm", faster, variant="fp8_block")
    assert there.parameters.eager_s == product.parameters.eager_s > 0.0
    assert there.parameters.stream_bytes_per_s == product.parameters.stream_bytes_per_s


def test_a_transferred_product_sustains_what_the_power_limit_allows() -> None:
    """Power goes as the cube of the clock: 350 W for 362 TFLOP/s on L40S, 450 for 165 on RTX 4090,
    72 for 121 on L4.
    """
    own = family("gemm", "vllm", load_hardware("l40s"), variant="bf16").parameters
    ample = family("gemm", "vllm", load_hardware("rtx-4090"), variant="bf16").parameters
    scarce = family("gemm", "vllm", load_hardware("l4"), variant="bf16").parameters
    assert ample.tensor_fraction == pytest.approx(
        min(MOST_SUSTAINED, own.tensor_fraction * (450 / 165.2 / (350 / 362.05)) ** (1 / 3))
    )
    assert scarce.tensor_fraction == pytest.approx(
        own.tensor_fraction * (72 / 121 / (350 / 362.05)) ** (1 / 3), rel=1e-3
    )
    unstated = replace(load_hardware("l4"), name="l4-of-mine", tdp_w=None)
    unlimited = family("gemm", "vllm", unstated, variant="bf16").parameters
    assert unlimited.tensor_fraction == own.tensor_fraction
    # Grouped products are far from the peak: power does not limit them.
    experts = [
        family("moe_gemm", "vllm", load_hardware(gpu), variant="bf16").parameters.tensor_fraction
        for gpu in ("h100-sxm", "h20-sxm")
    ]
    assert experts[0] == experts[1]


def test_experts_go_by_the_tile_rule_of_the_kernel_asked_for() -> None:
    a100 = load_hardware("a100-sxm-80gb")
    asked = "vllm_unquantizedfusedmoe_triton_tritonexperts"
    own = family("moe_gemm", "vllm", a100, variant="bf16")
    newer = family("moe_gemm", "vllm", a100, variant="bf16", kernel=asked)
    assert own.parameters.tile_rule == moe_tiles.OLDER
    assert newer.parameters == replace(own.parameters, tile_rule=moe_tiles.NEWER)


def test_streams_of_a_cache_are_built_for_the_bandwidth_of_another_generation() -> None:
    """Twice the bandwidth per SM: twice the stream; half of it: what it was, as in a generation."""
    h100 = load_hardware("h100-sxm")
    own = family("decode_attention", "vllm", h100)
    for generation, bandwidth, times in (("other", 2, 2), ("other", 0.5, 1), ("hopper", 2, 1)):
        there = replace(
            h100, generation=generation, hbm_bytes_per_s=bandwidth * h100.hbm_bytes_per_s
        )
        found = moved(own.kind, {"stream_bytes_per_s": 1e11}, place_of(h100), place_of(there))
        assert found == {"stream_bytes_per_s": pytest.approx(times * 1e11)}
    product = family("gemm", "vllm", h100, variant="bf16")
    there = replace(h100, generation="other", hbm_bytes_per_s=2 * h100.hbm_bytes_per_s)
    found = moved(product.kind, {"stream_bytes_per_s": 1e11}, place_of(h100), place_of(there))
    assert found == {"stream_bytes_per_s": 1e11}


def test_a_kernel_of_another_class_keeps_its_own_structure() -> None:
    own = family("decode_attention", "vllm", load_hardware("h100-sxm"))
    assert own.kernel == "vllm_flash_attn_fa3"

    def built(kernel: str) -> Any:
        return built_as(own.kind, "", own.parameters, own.kernel, kernel)

    assert built("") == built("fa3") == built("my_kernel") == own.parameters
    flash2 = built("vllm_flash_attn_fa2")
    assert flash2.swaps_heads == 1.0
    assert replace(flash2, swaps_heads=0.0) == own.parameters
    flashinfer = built("flashinfer")
    centre = own.kind.priors("flashinfer", "")["plain_cta_ratio"].value
    assert (flashinfer.plain_group, flashinfer.plain_cta_ratio) == (4.0, centre)


def test_another_engine_is_transferred() -> None:
    own = family("gemm", "", load_hardware("h100-sxm"), variant="bf16")
    other = family("gemm", "trtllm", load_hardware("h100-sxm"), variant="bf16")
    assert own.basis == "calibrated"
    assert other.basis == "transferred"
    assert other.interval == own.interval.wider(ENGINE_SPREAD)


def test_spreads_add_as_squares_of_logarithms() -> None:
    low, high = Interval(np.exp(-0.3), np.exp(0.4)).wider(0.3).factors()
    assert np.log(low) == pytest.approx(-0.3 * 2**0.5)
    assert np.log(high) == pytest.approx(0.5)
    twice = Interval(0.9, 1.2).wider(0.3).wider(0.4)
    assert twice == Interval(0.9, 1.2).wider(0.5)


def test_a_named_kernel_goes_before_the_most_measured_one() -> None:
    h100 = load_hardware("h100-sxm")
    usual = family("prefill_attention", "vllm", h100)
    named = family("prefill_attention", "vllm", h100, kernel="vllm_vit_flash_attn_fa3")
    assert usual.kernel == "vllm_flash_attn_fa3"
    assert named.kernel == "vllm_vit_flash_attn_fa3"


def test_an_fp8_cache_takes_the_kernel_measured_with_one() -> None:
    l40s = load_hardware("l40s")
    bf16 = family("decode_attention", "vllm", l40s, within={"element_bytes": 2.0})
    fp8 = family("decode_attention", "vllm", l40s, within={"element_bytes": 1.0})
    assert bf16.kernel == "vllm_flash_attn_fa2"
    assert fp8.kernel == "vllm_flashinfer_fidecode"


OWN = {"launch_s": 1e-6, "bandwidth_fraction": 0.5, "tensor_fraction": 0.5,
       "stream_bytes_per_s": 1e11, "tile_s": 1e-6, "wave_rounding": 0.5, "split_s": 1e-6,
       "unhidden_fraction": 0.2, "cache_fraction": 0.5, "burst_gain": 0.1,
       "raster_columns": 4.0, "n_rows": 77.0, "interval_low": 0.9, "interval_high": 1.2,
       "least_m": 1.0, "most_m": 4096.0}  # fmt: skip


def test_a_profile_with_its_own_family_answers_itself() -> None:
    mine = replace(load_hardware("h100-sxm"), families={"gemm/bf16": OWN})
    f = family("gemm", "vllm", mine, variant="bf16")
    assert (f.n_rows, f.basis, f.parameters.bandwidth_fraction) == (77, "calibrated", 0.5)
    assert f.interval == Interval(0.9, 1.2)
    low, mid, high = f.time_s(mine, {"m": 64.0, "n": 4096.0, "k": 4096.0}, cold=False)
    assert (low / mid, high / mid) == pytest.approx((0.9, 1.2))
    assert f.extrapolated({"m": np.array([0.9, 1.0, 4096.0, 4097.0])}).tolist() == [1, 0, 0, 1]


def test_a_variant_nobody_fitted_has_no_family() -> None:
    assert load_family("gemm", "vllm", load_hardware("h100-sxm"), variant="int4") is None


def test_fits_that_agree_disagree_by_nothing_and_one_fit_knows_no_other() -> None:
    assert disagreement(np.full((3, 2), 7.0)).tolist() == [0.0, 0.0]
    assert disagreement(np.ones((1, 2))).tolist() == [0.0, 0.0]
    assert disagreement(np.zeros((3, 2))).tolist() == [0.0, 0.0]
    # logarithms -0.1, 0, 0.1
    assert disagreement(np.exp([[-0.1], [0.0], [0.1]])) == pytest.approx([0.1])


def test_an_interval_widens_with_the_disagreement_of_fits() -> None:
    """From a usual 0.07 (0.10 with what no fit explains) to 0.17 its logarithm doubles, at none it
    is three tenths.
    """
    low, high = Interval(0.8, 1.3, usual=0.07).factors(np.array([0.0, 0.07, 0.17]))
    assert low == pytest.approx([0.8**0.3, 0.8, 0.64])
    assert high == pytest.approx([1.3**0.3, 1.3, 1.69])


def test_a_shape_on_which_the_fits_of_a_family_differ_has_a_wider_interval() -> None:
    """Fits that differ in the bandwidth alone say nothing of a call that is all launch."""
    h100 = load_hardware("h100-sxm")
    own = family("scan", "vllm", h100, variant="scan_step")
    own = replace(
        own,
        half_fits={"bandwidth_fraction": [0.3, 0.9]},
        parameters=replace(own.parameters, stream_bytes_per_s=1e15),
        interval=Interval(0.9, 1.1),
    )
    shape = {"seq_len": 1.0, "token_bytes": 0.0, "state_bytes": 1e6, "batch": [1e-6, 1e3]}
    low, mid, high = own.time_s(h100, {k: np.asarray(v) for k, v in shape.items()}, cold=False)
    width = (high - low) / mid
    assert width[0] == pytest.approx(0.2, rel=1e-4)
    assert width[1] > 1.0


def test_fits_of_halves_move_to_another_device_as_the_parameters_do() -> None:
    own = family("gemm", "vllm", load_hardware("l40s"), variant="bf16")
    there = family("gemm", "vllm", load_hardware("l4"), variant="bf16")
    for name in ("launch_s", "tensor_fraction", "bandwidth_fraction"):
        ratio = getattr(there.parameters, name) / getattr(own.parameters, name)
        moved = np.array(there.half_fits[name]) / np.array(own.half_fits[name])
        assert moved == pytest.approx(np.full(moved.shape, ratio))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("vllm_flash_attn_fa3", "fa3"),
        ("vllm_flash_attn", "fa2"),
        ("flash_attention", "fa3"),
        ("vllm_flashinfer_trtllmprefill", "trtllm"),
        ("vllm_flashinfer_fidecode", "flashinfer"),
        ("CutlassFP8ScaledMMLinearKernel", "cutlass"),
        ("VLLM_Custom_eager", "eager"),
        ("SGLang_CustomAllReduce_graph", "graph"),
        ("torch.nn.functional.linear", "other"),
    ],
)
def test_a_kernel_name_says_its_class(kernel: str, expected: str) -> None:
    assert kernel_class(kernel) == expected


def test_a_kernel_without_a_family_is_never_called_calibrated() -> None:
    h100 = load_hardware("h100-sxm")
    graph = family("collective", "vllm", h100, variant="all_reduce", kernel="vllm_custom_graph")
    assert graph.kernel == "sglang_customallreduce_graph", "not vLLM's, which the host starts"
    assert graph.basis == "transferred"
    unheard = family("scan", "sglang", h100, variant="scan_prefill", kernel="of_my_own")
    assert unheard.basis == "transferred"
    assert unheard.spread == ENGINE_SPREAD
    # whatever its name, a 16-bit product is cuBLAS's
    product = family("gemm", "vllm", h100, variant="bf16", kernel="of_my_own")
    assert product.basis == "calibrated"


def test_own_families_leave_other_kernels_of_the_gpu_to_those_that_ship() -> None:
    gpu = load_hardware("a100-sxm-80gb")
    theirs = next(
        f for f in shipped_families("collective")
        if (f.hardware, f.kernel) == (gpu.name, "vllm_custom_graph")
    )  # fmt: skip
    numbers = asdict(theirs.parameters)
    mine = replace(gpu, families={"collective/all_reduce/vllm/vllm_custom_graph": numbers})
    own = "calibration of this profile"
    for kernel, source in (
        ("", own),
        ("vllm_custom_graph", own),
        ("vllm_other_graph", own),
        ("sglang_customallreduce_eager", theirs.source),
    ):
        answers = family("collective", "vllm", mine, variant="all_reduce", kernel=kernel)
        assert answers.source == source, kernel
    gemm = next(f for f in shipped_families("gemm") if (f.hardware, f.engine) == (gpu.name, "vllm"))
    mine = replace(mine, families={"gemm/bf16/vllm/mine": asdict(gemm.parameters)} | mine.families)
    for engine, source in (("", own), ("vllm", own), ("torch", own), ("sglang", gemm.source)):
        assert family("gemm", engine, mine, variant="bf16").source == source, engine
    # another GPU's rows of a kernel say less than this one's of its like
    elsewhere = replace(mine, name="my-card")
    answers = family("collective", "vllm", elsewhere, variant="all_reduce", kernel=kernel)
    assert answers.source == own


# of our own kernels there are no records yet: they are priors
@pytest.mark.parametrize("kind", [k for k in kind_names() if k != "fused"])
def test_every_kind_ships_families_with_their_provenance(kind: str) -> None:
    families = shipped_families(kind)
    assert families
    for f in families:
        assert f.n_rows >= 4
        assert "aiconfigurator-core" in f.source
        assert set(f.kind.shape) <= set(f.ranges)
        assert f.held_out["mape"] > 0
        assert f.interval.low <= 1.0 <= f.interval.high
        assert f.interval.usual >= 0.0
        assert {len(values) for values in f.half_fits.values()} == {6}


# What an operation asks ------------------------------------------------------------------------

H100 = load_hardware("h100-sxm")


def gemm(**changes: object) -> Operation:
    fields = {
        "name": "up_proj",
        "kind": "gemm",
        "flops": 2.0 * 64 * 14336 * 4096,
        "weight_bytes": 14336 * 4096 * 2.0,
        "activation_bytes": 64 * (14336 + 4096) * 2.0,
        "shape": {"m": 64.0, "n": 14336.0, "k": 4096.0},
    }
    return Operation(**(fields | changes))  # type: ignore[arg-type]


def test_a_gemm_is_priced_by_its_family_and_not_below_the_roofline() -> None:
    t = fitted_time(gemm(), H100, "vllm")
    assert t is not None
    assert t.basis == "calibrated"
    assert gemm().moved_bytes / 3.35e12 <= t.low_s <= t.mid_s <= t.high_s < 2e-4
    assert t.launch_s + np.maximum(t.compute_s, t.memory_s) == pytest.approx(float(t.mid_s))


def test_a_quicker_start_never_makes_a_product_in_a_pass_longer() -> None:
    """Also where the roofline hides the start: on an H20, of little compute for its bandwidth."""
    h20 = load_hardware("h20-sxm")
    m = np.array([256.0, 512.0, 1024.0, 2048.0])
    shape = {"m": m, "n": 4096.0, "k": 4096.0}
    op = gemm(
        flops=2.0 * m * 4096 * 4096,
        weight_bytes=4096 * 4096 * 2.0,
        activation_bytes=m * 8192 * 2.0,
        shape=shape,
    )
    times = []
    for factor in (1.0, 1.5, 3.0):
        t = fitted_time(op, replace(h20, clock_hz=h20.clock_hz * factor), "sglang", in_situ())
        assert t is not None
        times.append(t.mid_s)
    assert np.all(np.diff(times, axis=0) <= 1e-12 * np.asarray(times[1:]))


def test_weight_only_products_stay_with_the_prior() -> None:
    assert fitted_time(gemm(weight_bytes=14336 * 4096 * 0.5), H100, "vllm") is None


def test_products_that_spill_intermediates_stay_with_the_prior() -> None:
    assert fitted_time(gemm(workspace_bytes=1e9), H100, "vllm") is None


def test_a_collective_in_a_pass_is_not_faster_than_its_link() -> None:
    """Its start hides behind other kernels: 1 GiB over the 32 GB/s of PCI Express does not."""
    sends = 2.0 * 7.0 / 8.0 * 2.0**30
    shape = {"message_bytes": 2.0**30, "n_gpus": 8.0}
    op = Operation(name="all_reduce", kind="collective", link_bytes=sends, shape=shape)
    t = fitted_time(op, load_hardware("l40s"), "vllm", in_situ())
    assert t is not None
    assert sends / 32e9 <= t.low_s <= t.mid_s <= t.high_s


def decode(kv_bytes_per_element: float) -> Operation:
    elements = 8 * 32768 * 8 * 256.0
    return Operation(
        name="attention",
        kind="decode_attention",
        flops=4.0 * 8 * 32 * 32768 * 128,
        state_bytes=elements * kv_bytes_per_element,
        shape={
            "batch": 8.0, "q_len": 1.0, "kv_len": 32768.0, "n_heads": 32, "n_kv_heads": 8,
            "head_dim": 128, "v_head_dim": 128, "kv_bytes": elements * kv_bytes_per_element,
        },
    )  # fmt: skip


def test_decode_attention_reads_its_cache_at_the_fitted_rate() -> None:
    # 1.074 GB at 3.35 TB/s = 320.5 us; published kernels of this size take 350 to 365 us.
    t = fitted_time(decode(2.0), H100, "vllm")
    assert t is not None
    assert 335e-6 < t.mid_s < 375e-6


def test_attention_of_a_long_step_streams_no_faster_than_its_kernel_ever_did() -> None:
    """A pass saves starts: a gigabyte still moves at what the family attains of the bandwidth."""
    l40s = load_hardware("l40s")
    attained = family("decode_attention", "vllm", l40s, within={"element_bytes": 2.0}).parameters
    op = decode(2.0)
    alone = fitted_time(op, l40s, "vllm")
    inside = fitted_time(op, l40s, "vllm", in_situ())
    assert alone is not None
    assert inside is not None
    streaming = op.state_bytes / (attained.bandwidth_fraction * l40s.hbm_bytes_per_s)
    assert streaming < inside.mid_s < alone.mid_s


def test_a_compressed_cache_stays_with_the_prior() -> None:
    assert fitted_time(decode(0.5625), H100, "vllm") is None
    assert fitted_time(decode(1.0), H100, "vllm") is not None


def prefill(pairs: float) -> Operation:
    return Operation(
        name="attention",
        kind="prefill_attention",
        flops=4.0 * 32 * 128 * pairs,
        state_bytes=16384 * 8 * 256 * 2.0,
        activation_bytes=16384 * 32 * 256 * 2.0,
        shape={
            "batch": 1.0, "q_len": 16384.0, "kv_len": 16384.0, "pairs": pairs, "n_heads": 32,
            "n_kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "window_tokens": np.inf,
        },
    )  # fmt: skip


def test_causal_prefill_is_fitted_and_sparse_patterns_are_not() -> None:
    full = float(causal_pairs(16384.0))
    t = fitted_time(prefill(full), H100, "vllm")
    assert t is not None
    assert 0.5 < 4.0 * 32 * 128 * full / 989.4e12 / t.mid_s < 0.85  # FlashAttention-3's MFU
    assert fitted_time(prefill(0.3 * full), H100, "vllm") is None


def test_a_cpu_has_no_gpu_families() -> None:
    assert fitted_time(gemm(), load_hardware("epyc-9654"), "vllm") is None


def test_a_profiles_family_without_its_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"families\.gemm: expected also launch_s"):
        kernel_kind("gemm").build({"foo": 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_fraction", 0.0),
        ("bandwidth_fraction", -0.5),
        ("stream_bytes_per_s", 1e-300),
        ("launch_s", 3.0),  # microseconds taken for seconds
        ("interval_low", 0.0),
        ("interval_high", 0.9),
    ],
)
def test_a_profile_s_family_that_no_kernel_has_is_refused(name: str, value: float) -> None:
    mine = replace(load_hardware("h100-sxm"), families={"gemm/bf16": OWN | {name: value}})
    with pytest.raises(ConfigError, match=name):
        family("gemm", "vllm", mine, variant="bf16")


def test_every_family_that_ships_may_stand_in_a_profile() -> None:
    for kind in map(kernel_kind, kind_names()):
        for f in shipped_families(kind.name):
            kind.check(asdict(f.parameters), f.kernel, f.variant)
