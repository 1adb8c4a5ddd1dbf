"""Methods that drop or select tokens: literal simulations and published sizes."""

from typing import Any

import numpy as np
import pytest
from method_points import attention, group, model, named, point, state_bytes, total

from costmodel.hardware import load_hardware
from costmodel.methods.h2o import H2O
from costmodel.methods.parse import parse_method
from costmodel.methods.pyramidkv import PyramidKV
from costmodel.mixers.mla import MLA
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

GIB = 2**30
_SMALL = attention(4, 2, 64)  # 512 bytes of K and V per token in 16 bits
_TOKEN = 2 * 2 * 64 * 2


# H2O -----------------------------------------------------------------------------------------


class HeavyHitters:
    """h2o_hf real dropping for one KV head: append, accumulate, keep top scores and the latest."""

    def __init__(self, probabilities: np.ndarray[Any, Any], heavy: int, recent: int) -> None:
        self.heavy, self.recent = heavy, recent
        self.positions = np.arange(len(probabilities), dtype=np.int32)
        self.scores = probabilities.astype(np.float32)
        self.keys = np.zeros((len(probabilities), 64), np.float16)
        self.values = np.zeros_like(self.keys)
        self.evict()

    def evict(self) -> None:
        n, kept = len(self.scores), self.heavy + self.recent
        if n <= kept:
            return
        top = np.argsort(-self.scores[: n - self.recent], kind="stable")[: self.heavy]
        index = np.concatenate([np.sort(top), np.arange(n - self.recent, n)])
        self.positions, self.scores = self.positions[index], self.scores[index]
        self.keys, self.values = self.keys[index], self.values[index]

    def append(self, probabilities: np.ndarray[Any, Any]) -> None:
        row = np.zeros((1, 64), np.float16)
        self.keys = np.concatenate([self.keys, row])
        self.values = np.concatenate([self.values, row])
        self.positions = np.append(self.positions, np.int32(self.positions[-1] + 1))
        self.scores = np.append(self.scores, np.float32(0)) + probabilities.astype(np.float32)
        self.evict()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.values, self.positions, self.scores))


@pytest.mark.parametrize("variant", ["slot", "real_drop"])
def test_h2o_step_by_step(variant: str) -> None:
    rng = np.random.default_rng(0)
    prompt = 97
    heads = [HeavyHitters(rng.random(prompt), heavy=9, recent=9) for _ in range(2)]
    for t in range(prompt, prompt + 30):
        held = sum(h.nbytes for h in heads)
        where = point(prompt, t)
        assert state_bytes(f"h2o:variant={variant}", where, group(_SMALL, 1)) == held
        for h in heads:
            h.append(rng.random(len(h.scores) + 1))
    assert held == 2 * 18 * (64 * 2 * 2 + 8)


def test_h2o_of_the_flexgen_engine() -> None:
    # OPT-6.7B, batch 24, 2048 + 2048 tokens, 0.2 + 0.2: logs say 48.0 GiB of cache, then 9.6
    layers = group(attention(32, 32), 32)
    where = point(2048, 4096, batch=24)
    assert state_bytes("full", where, layers) / GIB == 48.0
    kept = state_bytes("h2o:heavy_fraction=0.2,recent_fraction=0.2", where, layers)
    slots = 2 * int(0.2 * 2048)
    scores_and_positions = 24 * 32 * 32 * slots * 8
    assert slots == 818
    assert (kept - scores_and_positions) / GIB == pytest.approx(9.6, abs=0.02)


def test_h2o_presets_are_the_benchmarks() -> None:
    for preset, share in (("2x", 0.25), ("4x", 0.125), ("6x", 0.083), ("8x", 0.0625)):
        (method,) = parse_method(f"h2o:preset={preset}").resolved(7500).methods
        assert isinstance(method, H2O)
        assert (method.heavy_fraction, method.recent_fraction) == (share, share)
        assert method.preset is None
        assert method.variant == "slot"


def test_h2o_mask_saves_nothing() -> None:
    spec, layers = "h2o:variant=mask", group(_SMALL, 1)
    assert state_bytes(spec, point(1000), layers) == 1000 * _TOKEN
    # from the first decoded token on, 200 kept tokens have a score and a position each
    assert state_bytes(spec, point(1000, 1001), layers) == 1001 * _TOKEN + 2 * 200 * 8
    decode = parse_method(spec).decode(layers, point(1000, 1001))
    assert float(named(decode, "scored_attention").shape["kv_len"]) == 1001


def test_h2o_scores_cost_half_of_the_attention_again() -> None:
    stack, layers = parse_method("h2o"), group()
    ideal = stack.prefill(layers, point())
    assert total(ideal, "counted_flops") == pytest.approx(1.5 * total(ideal, "flops"), rel=1e-3)
    # O(S) memory at level ideal, the S x S matrix of 32 heads at level reference (8 bytes a score)
    assert max(float(op.transient_bytes) for op in ideal) < 0.5e9
    reference = stack.prefill(layers, point(level="reference"))
    peak = max(float(op.transient_bytes) for op in reference)
    mask = 10_000**2 * 2
    assert peak == pytest.approx(32 * 10_000**2 * 8 + mask + 10_000 * 32 * 256 * 2)
    assert total(reference, "counted_flops") == 32 * 10_000**2 * 4 * 128


# StreamingLLM --------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["cache", "fixed"])
def test_streaming_llm_step_by_step(positions: str) -> None:
    cache = list(range(40))
    spec = f"streaming_llm:sink_tokens=4,window_tokens=28,positions={positions}"
    for t in range(40, 60):
        kept = cache if len(cache) <= 32 else cache[:4] + cache[-28:]
        assert state_bytes(spec, point(40, t), group(_SMALL, 1)) == len(kept) * _TOKEN
        cache.append(t)


def test_streaming_llm_attends_a_band() -> None:
    prompt, sinks, window = 50, 3, 7
    pairs = sum(
        len({*range(min(sinks, i + 1)), *range(max(0, i - window + 1), i + 1)})
        for i in range(prompt)
    )
    spec = f"streaming_llm:sink_tokens={sinks},window_tokens={window}"
    (op,) = parse_method(spec).prefill(group(_SMALL, 1), point(prompt))
    assert float(op.flops) == pairs * 4 * 64 * 4
    assert float(op.counted_flops) == float(op.flops)


def test_streaming_llm_presets() -> None:
    # total = int(cr S), sinks = int(0.021 total), the rest window
    for spec, expected in (("2x", (78, 3672)), ("6x", (26, 1249)), ("8x", (19, 918))):
        parameters = parse_method(f"streaming_llm:preset={spec}").resolved(7500).parameters
        assert (parameters["sink_tokens"], parameters["window_tokens"]) == expected
        assert parameters["preset"] is None


def test_streaming_llm_upstream_runs_the_prompt_through_eager_attention() -> None:
    operations = parse_method("streaming_llm").prefill(group(), point(level="reference"))
    assert total(operations, "counted_flops") == 32 * 10_000**2 * 4 * 128
    fixed = parse_method("streaming_llm:positions=fixed")
    chunked = fixed.prefill(group(), point(level="reference"))
    assert float(named(chunked, "rotate_window").count) == 2  # 8192 and the rest


# InfLLM --------------------------------------------------------------------------------------


class ContextManager:
    """InfLLM's bookkeeping for one layer and sequence, in tensors."""

    def __init__(self, n_init: int, local: int, block: int, topk: int, cached: int, chunk: int):
        self.n_init, self.w, self.p, self.chunk = n_init, local, block, chunk
        kv = lambda n: np.zeros((2, 2, n, 64), np.float16)  # noqa: E731  (K and V, two KV heads)
        self.kv = kv
        self.init, self.local, self.remainder = kv(0), kv(0), kv(0)
        self.scores = np.zeros((4, 0), np.float16)
        self.buffer = kv(topk * block + chunk + block + n_init)
        self.cuda_cache = kv(cached * block)
        self.vectors = np.zeros((16, 4 * 64), np.float16)
        self.blocks: list[np.ndarray[Any, Any]] = []

    def append(self, n: int) -> None:
        for start in range(0, n, self.chunk):
            m = min(self.chunk, n - start)
            self.local = np.concatenate([self.local, self.kv(m)], axis=2)
            self.remainder = np.concatenate([self.remainder, self.kv(m)], axis=2)
            self.scores = np.concatenate([self.scores, np.zeros((4, m), np.float16)], axis=1)
            self._move_out()
        self.local = self.local[:, :, -self.w :].copy()

    def _move_out(self) -> None:
        over = self.remainder.shape[2] - self.w
        take = min(self.n_init - self.init.shape[2], over)
        if take > 0:
            self.init = np.concatenate([self.init, self.remainder[:, :, :take]], axis=2)
            self._drop(take)
        while self.remainder.shape[2] - self.p >= self.w:
            self.blocks.append(self.remainder[:, :, : self.p].copy())
            if len(self.blocks) > len(self.vectors):
                self.vectors = np.concatenate([self.vectors, np.zeros_like(self.vectors)])
            self._drop(self.p)

    def _drop(self, n: int) -> None:
        self.remainder = self.remainder[:, :, n:].copy()
        self.scores = self.scores[:, n:].copy()

    @property
    def device_nbytes(self) -> int:
        held = (self.init, self.local, self.remainder, self.scores, self.buffer)
        return sum(x.nbytes for x in (*held, self.cuda_cache, self.vectors))

    @property
    def host_nbytes(self) -> int:
        return sum(x.nbytes for x in self.blocks)


def test_infllm_step_by_step() -> None:
    spec = (
        "infllm:init_tokens=5,local_tokens=48,block_tokens=8,topk=2,cached_blocks=3,chunk_tokens=16"
    )
    for prompt in (70, 101, 230):
        manager = ContextManager(5, 48, 8, 2, 3, 16)
        manager.append(prompt)
        for t in range(prompt, prompt + 40):
            state = parse_method(spec).state(group(_SMALL, 1), point(prompt, t))
            assert float(state.device) == manager.device_nbytes, t
            assert float(state.host) == manager.host_nbytes, t
            manager.append(1)


def test_infllm_grows_its_representatives_in_doublings() -> None:
    manager = ContextManager(5, 48, 8, 2, 3, 16)
    manager.append(48 + 5 + 8 * 33)
    assert len(manager.vectors) == 64
    spec = (
        "infllm:init_tokens=5,local_tokens=48,block_tokens=8,topk=2,cached_blocks=3,chunk_tokens=16"
    )
    assert state_bytes(spec, point(48 + 5 + 8 * 33), group(_SMALL, 1)) == manager.device_nbytes


@pytest.mark.parametrize(
    ("prompt", "preset", "init", "topk", "local"),
    [
        (7500, "2x", 78, 9, 2520),
        (7500, "4x", 39, 4, 1324),
        (7500, "6x", 26, 3, 865),
        (7500, "8x", 19, 2, 662),
        (31500, "2x", 330, 39, 10428),
        (31500, "4x", 165, 19, 5278),
        (31500, "6x", 112, 13, 3579),
        (31500, "8x", 82, 9, 2703),
    ],
)
def test_infllm_presets(prompt: int, preset: str, init: int, topk: int, local: int) -> None:
    parameters = parse_method(f"infllm:preset={preset}").resolved(prompt).parameters
    assert parameters["init_tokens"] == init
    assert parameters["topk"] == parameters["cached_blocks"] == topk
    assert parameters["local_tokens"] == local


def test_infllm_link_traffic() -> None:
    stack, layers = parse_method("infllm"), group()
    where = point(100_000)
    n = (100_000 - 128 - 4096) // 128
    block = 128 * 8 * 256 * 2
    assert float(stack.state(layers, where).host) == 32 * n * block
    prefill = stack.prefill(layers, where)
    assert float(named(prefill, "offload_blocks").link_bytes) == n * block
    # a lookup wants 16 blocks; 32 of n are on the GPU
    decode = stack.decode(layers, where)
    expected = 16 * (1 - 32 / n) * block
    assert float(named(decode, "fetch_blocks").link_bytes) == pytest.approx(expected)
    assert not any(np.any(op.link_bytes) for op in stack.decode(layers, point(8000)))


def test_infllm_upstream_works_chunk_by_chunk() -> None:
    stack, layers = parse_method("infllm"), group()
    n = (100_000 - 128 - 4096) // 128
    chunks = 196  # 100,000 tokens in chunks of 512
    ideal = stack.prefill(layers, point(100_000))
    upstream = stack.prefill(layers, point(100_000, level="reference"))
    for name, kernels in (("attention", 3), ("local_scores", 1)):
        one, chain = named(ideal, name), named(upstream, name)
        assert (float(chain.count), chain.launches) == (chunks, kernels)
        assert float(chain.shape["q_len"]) == 512
        for amount in ("counted_flops", "moved_bytes", "vector_flops"):
            assert float(getattr(chain, amount)) * chunks == pytest.approx(
                float(getattr(one, amount))
            )
    # per lookup 16 blocks, and once more those that were not on the GPU
    missed = 16 * (1 - 32 / n)
    copies = named(upstream, "copy_blocks")
    assert float(copies.count) == pytest.approx(chunks * (16 + missed))
    assert float(copies.workspace_bytes) == 2 * 128 * 8 * 256 * 2


# SnapKV, PyramidKV, Knorm, TOVA ---------------------------------------------------------------


def test_snapkv_and_knorm_grow_while_decoding() -> None:
    layers = group(_SMALL, 1)
    assert state_bytes("snapkv", point(10_000, 10_007), layers) == (2048 + 7) * _TOKEN
    assert state_bytes("snapkv", point(1_000, 1_007), layers) == 1_007 * _TOKEN
    assert state_bytes("knorm:kept_fraction=0.3", point(1_001, 1_005), layers) == 304 * _TOKEN
    # kvpress notebook: compression 0.5 of 128,000 tokens of Llama-3.1-8B: 7.81 GiB
    assert state_bytes("knorm", point(128_000)) / GIB == pytest.approx(7.81, abs=0.01)


def test_snapkv_repository_caches_every_query_head() -> None:
    state = parse_method("snapkv").state(group(), point(level="reference"))
    assert float(state.allocated) == float(state.device) == 32 * 2048 * 32 * 256 * 2
    decode = parse_method("snapkv").decode(group(), point(level="reference"))
    read = named(decode, "attention")
    assert float(read.shape["kv_bytes"]) == 4 * 2048 * 8 * 256 * 2
    assert read.shape["n_kv_heads"] == 32
    assert parse_method("snapkv").state(group(), point()).allocated is None


def test_snapkv_scores_with_its_window_only() -> None:
    stack, layers = parse_method("snapkv"), group()
    extra = named(stack.prefill(layers, point()), "window_scores")
    assert float(extra.counted_flops) == 2 * 32 * 32 * 10_000 * 128
    assert not np.any(extra.flops)
    reference = stack.prefill(layers, point(131_072, level="reference"))
    matrix = 32 * 32 * 131_072
    softmax = named(reference, "window_softmax")
    assert float(softmax.transient_bytes) - 4 * 131_072 * 8 * 256 * 2 == 8 * matrix  # 1.07 GB


def pyramid(c: int, w: int, beta: int, n_layers: int, s: int) -> list[int]:
    """Budgets as the published loop computes them, layer by layer."""
    if s < c:
        return [s] * n_layers
    if s < (c - w) * 2:
        return [c] * n_layers
    low = (c - w) // beta
    high = (c - w) * 2 - low
    if high >= s - w:
        high = s - w
        low = (c - w) * 2 - high
    step = (high - low) // (n_layers - 1)
    return [high - layer * step + w for layer in range(n_layers)]


@pytest.mark.parametrize("prompt", [100, 2047, 2048, 3000, 4031, 4032, 4040, 4070, 10_000, 131_072])
@pytest.mark.parametrize("beta", [5, 20])
def test_pyramidkv_budgets(prompt: int, beta: int) -> None:
    budgets = pyramid(2048, 32, beta, 32, prompt)
    layers, spec = group(_SMALL), f"pyramidkv:beta={beta}"
    assert state_bytes(spec, point(prompt), layers) == sum(budgets) * _TOKEN
    assert state_bytes(spec, point(prompt, prompt + 9), layers) == (sum(budgets) + 32 * 9) * _TOKEN
    method = PyramidKV(beta=beta)
    assert [float(method.budget(prompt, x, 32)) for x in range(32)] == budgets
    if prompt >= 4032:  # the mean is the budget, but for the rounding of the step
        assert 0 <= sum(budgets) - 32 * 2048 < 32 * 31 / 2


def test_pyramidkv_mean_is_exact_where_the_step_divides() -> None:
    # m = 2000, beta 20: 100 .. 3900 over 20 layers is a step of 200
    layers = group(_SMALL, 20)
    spec = "pyramidkv:keep_tokens=2032"
    assert state_bytes(spec, point(50_000), layers) == 20 * 2032 * _TOKEN


def test_pyramidkv_counts_layers_of_the_whole_model() -> None:
    layers = group(_SMALL)
    even = type(layers)(_SMALL, 16, tuple(range(0, 32, 2)), 32)
    odd = type(layers)(_SMALL, 16, tuple(range(1, 32, 2)), 32)
    where = point(50_000)
    parts = [state_bytes("pyramidkv", where, x) for x in (even, odd)]
    assert parts[0] > parts[1]
    assert sum(parts) == state_bytes("pyramidkv", where, layers)
    reads = [
        float(named(parse_method("pyramidkv").decode(x, where), "attention").shape["kv_len"])
        for x in (even, odd)
    ]
    assert reads[0] * 16 * _TOKEN == parts[0]
    assert reads[1] * 16 * _TOKEN == parts[1]


def test_tova_holds_its_budget() -> None:
    layers = group(_SMALL, 1)
    sizes = [state_bytes("tova:keep_tokens=50", point(40, t), layers) for t in (40, 50, 51, 90)]
    assert sizes == [40 * _TOKEN, 50 * _TOKEN, 50 * _TOKEN, 50 * _TOKEN]
    step = parse_method("tova:keep_tokens=50").decode(layers, point(40, 90, level="reference"))
    assert float(named(step, "gather_kept").workspace_bytes) == 2 * 50 * _TOKEN


# Quest, MInference, offload --------------------------------------------------------------------


def test_quest_keeps_everything_and_page_metadata() -> None:
    layers = group(_SMALL, 4)
    for t, pages in ((3200, 200), (3201, 201), (3216, 201)):
        assert state_bytes("quest", point(3000, t), layers) == 4 * (
            t * _TOKEN + pages * 2 * 2 * 64 * 2
        )


def test_quest_reads_its_budget_but_not_in_the_first_two_layers() -> None:
    decode = parse_method("quest").decode(group(), point(32_768))
    dense, sparse = [op for op in decode if op.name == "attention"]
    assert (float(dense.count), float(sparse.count)) == (2 / 32, 30 / 32)
    assert float(dense.shape["kv_len"]) == 32_768
    assert float(sparse.shape["kv_len"]) == 2048
    read = named(decode, "estimate_pages").state_bytes + sparse.state_bytes
    per_token = 8 * 256 * 2
    # KV (1/p + budget/T), and the new token with its page
    expected = 32_768 * per_token * (1 / 16 + 2048 / 32_768) + per_token + 2 * per_token
    assert float(read) == pytest.approx(expected, rel=1e-12)


def test_minference_changes_prefill_alone() -> None:
    stack, layers = parse_method("minference"), group()
    prompt = 100_000
    operations = stack.prefill(layers, point(prompt))
    kept = 3004
    pairs = kept * (kept + 1) / 2 + (prompt - kept) * kept
    assert float(named(operations, "sparse_attention").flops) == pairs * 32 * 4 * 128
    assert float(named(operations, "index_scores").counted_flops) == 2 * 32 * 64 * prompt * 128
    full = parse_method("full").decode(layers, point(prompt))
    decode = stack.decode(layers, point(prompt))
    assert [op.name for op in decode] == [op.name for op in full]
    assert total(decode, "hbm_bytes") == total(full, "hbm_bytes")
    assert state_bytes("minference", point(prompt)) == state_bytes("full", point(prompt))


def test_kv_offload_moves_the_cache_every_step() -> None:
    stack, layers = parse_method("kv_offload"), group()
    where = point(32_768)
    layer = 32_768 * 8 * 256 * 2
    ideal = stack.state(layers, where)
    reference = stack.state(layers, point(32_768, level="reference"))
    assert (float(ideal.device), float(ideal.host)) == (2 * layer, 32 * layer)
    assert (float(reference.device), float(reference.host)) == (2 * layer, 30 * layer)
    assert total(stack.decode(layers, where), "link_bytes") == layer + 8 * 256 * 2
    both_ways = total(stack.decode(layers, point(32_768, level="reference")), "link_bytes")
    assert both_ways == 2 * layer + 8 * 256 * 2
    assert total(stack.prefill(layers, where), "link_bytes") == layer


def test_kv_offload_covers_latents_and_windows() -> None:
    mla = MLA(
        n_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    stack = parse_method("kv_offload:resident_layers=1")
    state = stack.state(group(mla, 4), point(1000))
    assert (float(state.device), float(state.host)) == (576 * 2000, 4 * 576 * 2000)
    windows = group(attention(4, 2, 64, window_tokens=100), 4)
    assert float(stack.state(windows, point(1000)).host) == 4 * 100 * _TOKEN


def test_windows_keep_their_own_cache_under_dropping_methods() -> None:
    windows = group(attention(4, 2, 64, window_tokens=3000), 4)
    shared = group(attention(4, 2, 64, owns_cache=False), 4)
    for spec in ("h2o", "streaming_llm", "infllm", "snapkv", "pyramidkv", "tova", "quest", "knorm"):
        stack = parse_method(spec)
        for layers in (windows, shared):
            where = point(50_000)
            assert not stack.covers(layers.mixer)
            assert float(stack.state(layers, where).device) == 4 * float(
                layers.mixer.state_bytes(where)
            )
    only_windows = model(attention(window_tokens=128), name="mistral")
    reason = parse_method("snapkv").refusal(only_windows)
    assert reason is not None
    assert "grows without bound" in reason
    assert "mistral has none" in reason


def test_infllm_upstream_waits_for_its_indices_so_host_and_kernels_add() -> None:
    """Published prefill of Llama-3-8B on an A100 (MInference README, 128 first tokens and a window
    of 8192): 14.6, 27.7, 55.6, 167.9 and 328.6 s; without the waits half of it was predicted.
    """
    contexts = np.array([50_000, 100_000, 200_000, 500_000, 1_000_000])
    published = np.array([14.6, 27.7, 55.6, 167.9, 328.6])
    predicted = predict(
        load_architecture("llama-3-8b"),
        "infllm:local_tokens=8192",
        Workload.of(1, contexts, 1),
        load_hardware("a100-sxm-80gb"),
        level="reference",
        solve=False,
    )
    assert np.all(np.abs(predicted["ttft_s"] / published - 1) < 0.15)
    assert np.all(predicted["ttft_low_s"] < published)
    assert np.all(predicted["ttft_high_s"] > published)
