"""Experts, recurrent mixers, sparse-index modules and collectives, worked by hand."""

from dataclasses import replace

import numpy as np
import pytest

from costmodel.hardware import load_hardware
from costmodel.kernels import moe_tiles
from costmodel.kernels.collective import CollectiveParameters, collective_time_s
from costmodel.kernels.families import shipped_families
from costmodel.kernels.moe import MoeParameters, grouped_product_time_s, moe_time_s
from costmodel.kernels.routing import experts_hit, loads
from costmodel.kernels.scan import ScanParameters, scan_time_s
from costmodel.kernels.sparse import SparseParameters, module_work, sparse_time_s
from tests.unit.test_kernels_physics import device

# Experts -------------------------------------------------------------------------------------

MOE = MoeParameters(
    launch_s=1e-5,
    bandwidth_fraction=0.5,
    tensor_fraction=1.0,
    stream_bytes_per_s=1e18,
    tile_rows=128.0,
    tile_s=0.0,
    wave_rounding=0.0,
    expert_s=0.0,
    row_s=0.0,
    unhidden_fraction=0.0,
)


def test_one_token_hits_k_experts_and_many_hit_all() -> None:
    assert experts_hit(1, 8, 256) * 256 == pytest.approx(8.0)
    assert experts_hit(2, 8, 256) * 256 == pytest.approx(8 + 248 * 8 / 256)
    assert experts_hit(10**6, 8, 256) == pytest.approx(1.0)


def test_even_loads_add_up_to_all_assignments() -> None:
    ((hit, each),) = loads(1000.0, 8.0, 64.0, 64.0, 0.0)
    assert hit * each == pytest.approx(8000.0)


def test_power_law_loads_add_up_when_all_experts_are_here() -> None:
    classes = loads(4096.0, 8.0, 128.0, 128.0, 1.01)
    assert sum(float(n * load) for n, load in classes) == pytest.approx(4096 * 8, rel=0.02)
    assert max(float(load) for n, load in classes if n > 0) > 3 * 256  # skewed: mean is 256


def test_the_busiest_gpu_gets_more_than_its_share() -> None:
    fair = 4096 * 8 * 16 / 128
    busiest = sum(float(n * load) for n, load in loads(4096.0, 8.0, 128.0, 16.0, 1.2))
    assert 1.3 * fair < busiest < 8 * fair


def test_decode_of_experts_reads_the_hit_experts_once() -> None:
    # 64 tokens, 8 of 128 experts: 1 - (1 - 1/16)^64 = 98.393 % hit = 125.94 experts of
    # 3 x 2048 x 768 x 2 bytes = 9.437 MB = 1188.5 MB, activations 512 rows x (2048 + 2 x 768 in
    # and out of the first product, 768 + 2048 of the second) x 2 bytes, and 1.25 passes over the
    # outputs (2 x 768, 2048) after each, at half of 1 TB/s.
    t = moe_time_s(MOE, device(), 64, 2048, 768, 8, 128, 128)
    hit = 128 * (1 - (15 / 16) ** 64)
    rows = 2 * 2048 + 3 * 768 + 1.25 * (2 * 768 + 2048)
    n_bytes = hit * 3 * 2048 * 768 * 2 + 512 * rows * 2
    assert t == pytest.approx(1e-5 + n_bytes / 0.5e12, rel=1e-6)
    assert hit == pytest.approx(125.94, abs=0.01)


def test_prefill_of_experts_runs_whole_tiles() -> None:
    # 16384 tokens x 8 over 64 experts: 2048 rows each, 16 tiles of 128: nothing padded.
    # 131072 rows x 6 x 4096 x 1024 FLOPs / 1e14 = 32.985 ms, and what the kernels after them pass:
    # 131072 x 1.25 x (2 x 1024 + 4096) x 2 bytes at half of 1 TB/s = 4.027 ms.
    t = moe_time_s(MOE, device(), 16384, 4096, 1024, 8, 64, 64)
    after = 131072 * 1.25 * 6144 * 2 / 0.5e12
    assert t == pytest.approx(1e-5 + 131072 * 6 * 4096 * 1024 / 1e14 + after, rel=1e-3)


def test_two_grouped_products_are_the_layer() -> None:
    sizes = (300.0, 8.0, 64.0, 64.0)
    up = grouped_product_time_s(MOE, device(), 2 * 1024.0, 4096.0, *sizes)
    down = grouped_product_time_s(MOE, device(), 4096.0, 1024.0, *sizes)
    layer = moe_time_s(MOE, device(), 300, 4096, 1024, 8, 64, 64)
    assert up + down == pytest.approx(float(layer))


def taken(rule: float, tokens: float, experts: float, inner: float, variant: str = "bf16") -> set:  # type: ignore[type-arg]
    found = moe_tiles.tiles(rule, 128.0, 0.8, (tokens, experts, inner), "a100-sxm-80gb", variant)
    return {(t.rows, t.columns, t.share) for t in found if t.allowed.all()}


def test_default_tiles_are_those_of_the_library() -> None:
    # vLLM's get_default_config, as its source has it, and those of more tokens; (8, 4096) has a
    # tuned file on A100.
    older = moe_tiles.OLDER_SHARE * 0.8
    assert taken(moe_tiles.OLDER, 8, 8, 1000) == {(16, 32, older), (64, 64, older)}
    assert taken(moe_tiles.OLDER, 9, 8, 1000) == {(64, 64, older)}
    menu = [(16, 64, 0.8), (32, 64, 0.8), (32, 128, 0.8), (64, 128, 0.8), (128, 128, 0.8)]
    for tokens, first in ((32, 0), (64, 1), (96, 2), (512, 3), (513, 4)):
        assert taken(moe_tiles.NEWER, tokens, 8, 1000) == set(menu[first:])
    assert taken(moe_tiles.NEWER, 65, 8, 1000, "fp8_block") == {(64, 128, 0.8)}
    tuned = taken(moe_tiles.OLDER, 9, 8, 4096)
    assert {rows for rows, _, _ in tuned} == {16, 32, 64, 128}
    assert {share for _, _, share in tuned} == {1.0}
    assert tuned == taken(moe_tiles.NEWER, 9, 8, 4096)


@pytest.mark.parametrize("rule", [moe_tiles.BEST, moe_tiles.OLDER, moe_tiles.NEWER])
@pytest.mark.parametrize("variant", ["bf16", "fp8_block"])
def test_more_tokens_never_take_less_time(rule: float, variant: str) -> None:
    p = replace(MOE, tile_rule=rule, default_share=0.8, tile_s=1e-6, wave_rounding=0.5)
    tokens = np.arange(1.0, 2000.0)
    for experts, inner in ((8, 1000), (64, 640), (512, 64)):
        seconds = moe_time_s(p, device(), tokens, 2048, inner, 2, experts, experts, variant)
        assert np.all(np.diff(seconds) >= -1e-12)


def test_a_shape_without_a_file_runs_at_the_defaults_share_of_the_tensor_rate() -> None:
    # 16384 tokens: 2048 rows per expert, whole tiles of 64 (older) or 128 rows (newer) either way.
    sizes = (16384, 4096, 1000, 8, 64, 64)
    best = float(moe_time_s(MOE, device(), *sizes))
    other = 131072 * 1.25 * (2 * 1000 + 4096) * 2 / 0.5e12 + 1e-5
    p = replace(MOE, tile_rule=moe_tiles.NEWER, default_share=0.8)
    newer = float(moe_time_s(p, device(), *sizes))
    assert newer - other == pytest.approx((best - other) / 0.8, rel=1e-6)
    with_file = moe_time_s(p, device(name="h100-sxm"), 16384, 4096, 512, 8, 128, 128)
    assert float(with_file) <= float(moe_time_s(MOE, device(), 16384, 4096, 512, 8, 128, 128))


def test_kernels_that_sort_out_other_gpus_rows_pass_fewer_bytes() -> None:
    sizes = (4096, 2048, 768, 8, 128, 16)  # an eighth of the experts is here
    kept = moe_time_s(MOE, device(), *sizes, dealt=1.0)
    local = moe_time_s(replace(MOE, local_rows=1.0), device(), *sizes, dealt=1.0)
    # Memory binds. Seven eighths of 32768 rows: what both products read and write, and 1.25 passes
    # over their outputs, at half of 1 TB/s.
    elements = (2 * 768 + 2048) + (768 + 2048) + 1.25 * (2 * 768 + 2048)
    gone = 32768 * 7 / 8 * elements * 2 / 0.5e12
    assert float(kept) - float(local) == pytest.approx(gone, rel=1e-9)


# Recurrent mixers ----------------------------------------------------------------------------


SCAN = ScanParameters(launch_s=0.0, bandwidth_fraction=1.0, stream_bytes_per_s=1e15)


def test_a_recurrent_step_reads_and_writes_its_state() -> None:
    # 64 sequences x 32 heads x 128 x 128 x 4 bytes x 2 = 268.4 MB at half of 1 TB/s = 536.9 us.
    p = replace(SCAN, launch_s=2e-6, bandwidth_fraction=0.5)
    t = scan_time_s(p, device(), "scan_step", 64, 1, 0.0, 2 * 32 * 128 * 128 * 4)
    assert t == pytest.approx(2e-6 + 268435456 / 0.5e12, rel=1e-9)


def test_kernels_bound_by_their_instructions_do_not_see_faster_memory() -> None:
    # 100 SMs at 1.8 GHz that move 2 GB/s each: 1 GB in 5 ms, whatever DRAM can do.
    p = replace(SCAN, stream_bytes_per_s=2e9)
    for bandwidth in (1e12, 4e12):
        d = device(hbm_bytes_per_s=bandwidth)
        assert scan_time_s(p, d, "conv_prefill", 1, 1000, 1e6, 0.0) == pytest.approx(5e-3)
        prompt = scan_time_s(p, d, "scan_prefill", 1, 1000, 1e6, 0.0)
        assert prompt == pytest.approx(5e-3)
    assert scan_time_s(SCAN, device(), "conv_prefill", 1, 1000, 1e6, 0.0) == pytest.approx(1e-3)


def test_a_long_prompt_goes_through_its_chunks_one_after_the_other() -> None:
    # 32,768 tokens are 512 chunks of 64 at 4 us: 2,048 us; memory hides behind.
    p = replace(SCAN, chunk_s=4e-6)
    t = scan_time_s(p, device(), "scan_prefill", 1, 32768, 1024.0, 0.0)
    assert t == pytest.approx(512 * 4e-6)


def test_products_inside_a_chunk_count_by_how_full_it_is_and_only_once() -> None:
    p = replace(SCAN, launch_s=1e-5, own_s=8e-6)
    times = scan_time_s(p, device(), "scan_prefill", 1, np.array([16, 64, 6400]), 0.0, 0.0)
    assert times == pytest.approx([1.2e-5, 1.8e-5, 1.8e-5])


def test_kernels_that_write_every_chunk_s_state_move_it_with_every_chunk() -> None:
    # 4 sequences of 10 chunks, 1 MB of state in and out: once, and half of it per chunk, at half
    # of 1 TB/s: 4 x 1e6 x (1 + 10 x 0.5) / 0.5e12 = 48 us.
    p = replace(SCAN, bandwidth_fraction=0.5, state_bytes_per_s=1e15, chunk_states=0.5)
    assert scan_time_s(p, device(), "scan_prefill", 4, 640, 0.0, 1e6) == pytest.approx(48e-6)


def test_a_convolution_may_cost_per_token_and_its_host_per_sequence() -> None:
    # 8 x 1,000 tokens of 1,000 bytes at 1 TB/s = 8 us, and 8,000 x 20 ns = 160 us.
    p = replace(SCAN, token_s=2e-8, eager_s=4e-4, eager_sequence_s=3e-6)
    assert scan_time_s(p, device(), "conv_prefill", 8, 1000, 1e3, 0.0) == pytest.approx(168e-6)
    warm = scan_time_s(p, device(), "conv_prefill", 8, 1000, 1e3, 0.0, cold=False)
    assert warm == pytest.approx(4e-4 + 8 * 3e-6)


def test_a_replayed_step_that_fits_the_cache_is_read_from_there() -> None:
    p = replace(SCAN, cache_gain=2.0, cache_fraction=1.0)
    d = device(l2_bytes=1e8)
    small, large = np.array([10.0, 1000.0]) * 1e6
    assert scan_time_s(p, d, "scan_step", 1, 1, 0.0, small, cold=False) == pytest.approx(5e-6)
    assert scan_time_s(p, d, "scan_step", 1, 1, 0.0, large, cold=False) == pytest.approx(1e-3)
    assert scan_time_s(p, d, "scan_step", 1, 1, 0.0, small) == pytest.approx(1e-5)


# Sparse index --------------------------------------------------------------------------------

DEEPSEEK_V32 = {
    "batch": 1.0, "q_len": 1.0, "prefix": 65535.0, "n_heads": 128.0, "hidden": 7168.0,
    "q_rank": 1536.0, "nope_dim": 128.0, "value_dim": 128.0, "index_heads": 64.0, "has_index": 1.0,
    "dense": 0.0, "weight_bytes": 1.0, "element_bytes": 2.0,
}  # fmt: skip


def test_module_weights_are_those_of_the_published_layer() -> None:
    # DeepSeek-V3.2's attention: q_a 7168 x 1536, kv_a 7168 x 576, q_b 1536 x 128 x 192, kv_b
    # 512 x 128 x 256, o 16384 x 7168 = 187,105,280 (DeepSeek-V3's matrices), and the index:
    # wq_b 1536 x 8192, wk 7168 x 128, weights 7168 x 64 = 13,959,168.
    w = module_work(DEEPSEEK_V32)
    assert w["weight_bytes"] == 187_105_280 + 13_959_168
    assert w["projection_flops"] == 2 * (187_105_280 + 13_959_168)


def test_the_index_scores_everything_and_attention_reads_2048() -> None:
    w = module_work(DEEPSEEK_V32)
    assert w["index_flops"] == 2 * 65536 * 64 * 128
    assert w["index_bytes"] == 65536 * 132
    assert w["latent_bytes"] == 2048 * 576 * 2
    assert w["attention_flops"] == 2048 * 128 * 2 * (576 + 512)


def test_without_an_index_nothing_is_scored() -> None:
    w = module_work(DEEPSEEK_V32 | {"has_index": 0.0})
    assert w["index_flops"] == w["index_bytes"] == 0.0
    assert w["weight_bytes"] == 187_105_280


def test_scores_of_a_prompt_are_one_matrix_over_all_sequences() -> None:
    # 3 sequences of 10 new tokens after 90: 30 x 300 scores of 4 bytes; one token each: 3 x 100.
    prompt = DEEPSEEK_V32 | {"batch": 3.0, "q_len": 10.0, "prefix": 90.0}
    step = DEEPSEEK_V32 | {"batch": 3.0, "q_len": 1.0, "prefix": 99.0}
    assert module_work(prompt)["score_bytes"] == 30 * 300 * 4
    assert module_work(step)["score_bytes"] == 3 * 100 * 4


def test_the_host_shows_in_eager_tables_only() -> None:
    p = SparseParameters(
        launch_s=1e-5, head_s=0.0, bandwidth_fraction=1.0, tensor_fraction=1.0, index_fraction=1.0,
        attention_fraction=1.0, gather_fraction=1.0, token_s=0.0, unhidden_fraction=0.0,
        eager_s=1e-3, uncaptured_s=2e-3,
    )  # fmt: skip
    d = device(memory_bytes=8e10)
    many = DEEPSEEK_V32 | {"batch": 300.0, "prefix": 15.0}
    prompt = DEEPSEEK_V32 | {"q_len": 2.0, "prefix": 0.0}
    assert sparse_time_s(p, d, DEEPSEEK_V32 | {"prefix": 15.0}, cold=False) < 1e-3
    assert sparse_time_s(p, d, many, cold=False) == 2e-3
    assert sparse_time_s(p, d, prompt, cold=False) == 1e-3
    assert sparse_time_s(p, d, many) < 2e-3


# Collectives ---------------------------------------------------------------------------------

LINK = CollectiveParameters(
    launch_s=4e-6,
    peer_s=1e-6,
    second_phase_s=3e-6,
    one_shot_fraction=0.5,
    link_fraction=0.8,
)


def test_a_ring_sends_two_n_minus_one_over_n() -> None:
    # 8 Ampere GPUs, 1 GB, link 100 GB/s: 1.75 GB at 80 GB/s = 21.875 ms.
    t = collective_time_s(LINK, device(generation="ampere"), 1e9, 8)
    assert t == pytest.approx(4e-6 + 7e-6 + 3e-6 + 1.75e9 / 80e9, rel=1e-9)


def test_a_switch_that_adds_sends_n_plus_one_over_n() -> None:
    t = collective_time_s(LINK, device(generation="hopper"), 1e9, 8)
    assert t == pytest.approx(4e-6 + 7e-6 + 3e-6 + 1.125e9 / 80e9, rel=1e-9)


def test_small_messages_are_read_in_one_shot() -> None:
    # 16 KiB from 7 peers at 50 GB/s: 2.29 us, no second phase.
    t = collective_time_s(LINK, device(), 16384, 8)
    assert t == pytest.approx(4e-6 + 7e-6 + 7 * 16384 / 50e9, rel=1e-9)


def test_one_gpu_sends_nothing() -> None:
    assert collective_time_s(LINK, device(), 1e9, 1) == 0.0


def test_gather_moves_the_others_parts() -> None:
    t = collective_time_s(LINK, device(), 1e9, 4, "all_gather")
    assert t == pytest.approx(4e-6 + 3e-6 + 3e-6 + 0.75e9 / 80e9, rel=1e-9)


@pytest.mark.parametrize("kind", ["moe_gemm", "scan", "sparse_attention", "collective"])
def test_every_shipped_family_answers_for_every_gpu(kind: str) -> None:
    for family in shipped_families(kind):
        shape = {name: np.array([least, most]) for name, (least, most) in family.ranges.items()}
        for gpu in ("h100-sxm", "h200-sxm", "a100-sxm-80gb", "l40s", "b200-sxm", "gb200"):
            low, mid, high = family.time_s(load_hardware(gpu), shape)
            bound = family.kind.roofline_s(load_hardware(gpu), shape, family.variant)
            if kind != "collective":
                assert np.all(mid >= bound * (1 - 1e-9)), (family.kernel, gpu)
            assert np.all((low <= mid) & (mid <= high))
            assert np.all(np.isfinite(high))


def test_parameters_are_replaceable() -> None:
    assert replace(LINK, launch_s=0.0).launch_s == 0.0
