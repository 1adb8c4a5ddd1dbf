"""Parallelism inside a replica and between pools, against numbers worked out by hand.

Links: an H100 sends 450 GB/s over NVLink, of which long transfers reach 0.65; a call takes 14 us.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
from planning_cases import candidate, spec

from costmodel.hardware import load_hardware
from costmodel.layout import token_operations
from costmodel.model import Model
from costmodel.operation import Operation
from costmodel.options import Options
from costmodel.planning.disaggregated import Pair, PairParts, screen_pair, sent_s
from costmodel.planning.fleet import simulate
from costmodel.planning.load import Load
from costmodel.planning.metrics import measured
from costmodel.planning.parallel import Parallel
from costmodel.planning.slo import Slo
from costmodel.planning.steps import StepTable
from costmodel.registry import load_architecture

NVLINK = 450e9 * 0.65
CALL_S = 14e-6


def model(
    name: str = "llama-3.1-8b", method: str = "full", gpu: str = "h100-sxm", tp: int = 1
) -> Model:
    return Model.of(load_architecture(name), method, load_hardware(gpu), Options(tp=tp))


# Pipelines -----------------------------------------------------------------------------------


def engine(chunk: int = 64, weights_s: float = 1e-3, token_s: float = 1e-4) -> StepTable:
    """L(n) = weights + n per_token, nothing else."""
    tokens = np.arange(1025.0)
    coarse = 1024 + 64 * np.arange(140.0)
    return StepTable(
        chunk_tokens=chunk, max_batch=8, knots=[0.0],
        base=[[], *([weights_s + n * token_s] for n in range(1, 9))], slope=[[]] + [[0.0]] * 8,
        exact_s=[0.0, *(weights_s + token_s * tokens[1:]).tolist()],
        coarse_s=(weights_s + token_s * coarse).tolist(),
        prompt_s=[0.0] * 60, prefix_s=[0.0] * 60, prompt_shift=6,
        floor_s=0.0, alone_s=0.0, host_s=0.0,
    )  # fmt: skip


def requests_of(prompts: list[int], outputs: list[int]) -> Load:
    p, ones = np.array(prompts, dtype=float), np.ones(len(prompts))
    return Load(
        arrival_s=0 * p, input_tokens=p, prompt_tokens=p, cached_tokens=0 * p,
        output_tokens=np.array(outputs, dtype=float), before_s=0 * p, held_bytes=ones,
        held_slope=0 * p, moved_bytes=ones, moved_slope=0 * p,
    )  # fmt: skip


def first_token_s(table: StepTable, parallel: Parallel, prompt: int) -> float:
    work = requests_of([prompt], [1])
    drain = parallel.drain_s(table, work.prompt_tokens, work.cached_tokens)
    found = simulate(work, table, 1e9, 1)
    load = Load(**{name: getattr(work, name) for name in work.__slots__ if name != "drain_s"},
                drain_s=drain)  # fmt: skip
    return float(measured(found, load, Slo()).ttft[0])


def pipeline_s(chunks_s: list[float], stages: int) -> float:
    """A literal pipeline: a chunk enters a stage once it left the last and its forerunner left."""
    left = [0.0] * stages
    for whole in chunks_s:
        before = 0.0
        for s in range(stages):
            before = left[s] = max(before, left[s]) + whole / stages
    return left[-1]


def test_a_pipeline_fills_before_it_pays() -> None:
    # 256 tokens over 4 stages in chunks of 64: 4 + 3 stage times of (1 + 6.4) / 4 = 1.85 ms each.
    parallel = Parallel(pp=4)
    table = parallel.applied(engine(), model())
    sends = 1.75 * 3 * (CALL_S + 64 * 4096 * 2 / NVLINK)
    assert first_token_s(table, parallel, 256) == pytest.approx(7 * 1.85e-3 + sends, rel=1e-9)


@pytest.mark.parametrize("stages", [2, 4])
def test_first_tokens_are_those_of_a_literal_pipeline(stages: int) -> None:
    parallel = Parallel(pp=stages)
    table = parallel.applied(engine(), model())
    for prompt in (1, 10, 64, 200, 64 * stages, 640, 1100, 64 * stages * 5):
        size = 64 if prompt > 64 else math.ceil(prompt / stages)
        ways = [[size] * (prompt // size) + [prompt % size] * (prompt % size > 0)]
        if prompt <= 64:
            ways.append([prompt])  # or whole, where the weights take longer than its tokens
        best = min(pipeline_s([1e-3 + n * 1e-4 for n in way], stages) for way in ways)
        said = first_token_s(table, parallel, prompt)
        # Chunks that do not divide are spread evenly here, and sends come on top.
        assert 0.90 * best <= said <= 1.04 * best + 1e-4, (prompt, said, best)


def test_a_full_pipeline_loses_nothing() -> None:
    """Many prompts: a chunk of 64 leaves every stage time; filling counts once."""
    parallel = Parallel(pp=4)
    table = parallel.applied(engine(), model())
    found = simulate(requests_of([256] * 200, [1] * 200), table, 1e9, 1)
    per_prompt = 4 * 1.85e-3 + 3 * (CALL_S + 64 * 8192 / NVLINK)
    assert found.finish_s.max() == pytest.approx(200 * per_prompt, rel=1e-6)


def test_a_longer_pipeline_is_never_faster_for_a_lone_token() -> None:
    seconds = []
    for stages in (1, 2, 4, 8):
        parallel = Parallel(pp=stages)
        table = parallel.applied(engine(), model())
        found = simulate(requests_of([1], [50]), table, 1e9, 1)
        seconds.append(float(found.finish_s[0] - found.first_s[0]) / 49)
    assert all(a <= b for a, b in pairwise(seconds))
    # 1.1 ms a token, and seven sends of one token's 8,192 bytes.
    assert seconds[-1] == pytest.approx(1.1e-3 + 7 * (CALL_S + 8192 / NVLINK), rel=1e-6)


# Experts -------------------------------------------------------------------------------------


def exchange(tokens: float, ep: int, tp: int = 1) -> Operation:
    """Qwen3-30B-A3B: d = 2,048, 8 of 128 experts, 48 layers."""
    m = model("qwen3-30b-a3b", gpu="h200-sxm", tp=tp)
    one = np.float64(1.0)
    operations = token_operations(m.run, m.point(one, one, one), np.float64(tokens))
    found = [op for op in Parallel(ep=ep).experts(operations, tokens, m) if op.name == "all_to_all"]
    assert len(found) == 1
    return found[0]


def test_all_to_all_by_hand() -> None:
    # 1,000 tokens on each of 4 ranks: 8,000 copies of 4,096 bytes, 3 of 4 go elsewhere, there and
    # back in 48 layers. The fullest rank gets 1 + sqrt(2 ln 4 / 8,000) = 1.0186 of the mean.
    op = exchange(1000.0, 4)
    assert op.count == 96
    assert float(np.max(op.link_bytes)) == pytest.approx(8000 * 4096 * 0.75 * 1.018616, rel=1e-5)
    assert op.launches == 1.0


def test_all_to_all_between_nodes_takes_the_network() -> None:
    # 8 ranks of 2 GPUs are two nodes: 450 GB/s become 50, so as many bytes as 9 times over NVLink.
    near, far = exchange(1000.0, 4, tp=2), exchange(1000.0, 8, tp=2)
    share = (7 / 8) * (1 + math.sqrt(2 * math.log(8) / 8000)) / (0.75 * 1.018616)
    ratio = float(np.max(far.link_bytes)) / float(np.max(near.link_bytes))
    assert ratio == pytest.approx(9 * share, rel=1e-5)


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("tokens", [4, 32, 512, 8192])
def test_the_fullest_rank_against_drawn_routings(ep: int, tokens: int) -> None:
    rng = np.random.default_rng(1)
    counts = rng.multinomial(tokens * 8 * ep, [1 / ep] * ep, 2000)
    drawn = float(counts.max(axis=1).mean()) / (tokens * 8)
    said = float(Parallel(ep=ep).fullest(np.float64(tokens), 8.0))
    # sqrt(2 ln n) is an upper estimate for few ranks: on the safe side, never by much.
    assert drawn <= said * 1.001
    assert said - 1 <= 2.2 * (drawn - 1)
    assert float(Parallel(ep=ep).fullest(np.float64(0.01), 1.0)) == ep


# Context parallelism -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "gpu", "tp", "cp", "seconds"),
    [
        # 32,768 tokens x 131,072 bytes, 3 of 4 parts over NVLink: 3.22 GB / 292.5 GB/s
        ("llama-3.1-8b", "full", "h100-sxm", 1, 4, 11.01e-3),
        # Tensor-parallel halves pass half each.
        ("llama-3.1-8b", "full", "h100-sxm", 2, 4, 5.506e-3),
        # What SnapKV drops after the prompt still has to be seen by all of it.
        ("llama-3.1-8b", "snapkv", "h100-sxm", 1, 4, 11.01e-3),
        # PCIe: 32 GB/s x 0.65 = 20.8
        ("llama-3.1-8b", "full", "l40s", 1, 4, 154.9e-3),
        # 16 GPUs, two nodes: 7/8 of 2.147 GB at 32.5 GB/s
        ("llama-3.1-8b", "full", "h100-sxm", 2, 8, 57.8e-3),
        # Gemma-2-9B: 8,192 bytes per layer and token; 21 layers hold all, 21 a window of 4,096
        ("gemma-2-9b", "full", "h100-sxm", 1, 4, 16.26e-3),
        # No attention, no ring.
        ("mamba2-2.7b", "full", "h100-sxm", 1, 4, 0.0),
    ],
)
def test_the_ring_by_hand(
    name: str, method: str, gpu: str, tp: int, cp: int, seconds: float
) -> None:
    found = Parallel(cp=cp).ring_s(model(name, method, gpu, tp), np.array([32768.0]))
    assert float(np.max(found)) == pytest.approx(seconds, rel=1e-3, abs=1e-12)


def test_decode_over_a_spread_cache_by_hand() -> None:
    # 32 layers, out and back: 14 us and 16 x 8,192 bytes x 3/4 over 292.5 GB/s = 0.336 us each.
    assert Parallel(cp=4).decode_exchange_s(model(), 16) == pytest.approx(64 * 14.336e-6, rel=1e-4)
    assert Parallel(cp=4).decode_exchange_s(model("mamba2-2.7b"), 16) == 0.0
    assert Parallel().decode_exchange_s(model(), 16) == 0.0


def test_a_slow_link_binds_long_chunks() -> None:
    """Over PCIe passing K and V takes longer than a quarter of the attention; NVLink hides it."""
    seconds = {}
    for gpu in ("h100-sxm", "l40s"):
        m = model(gpu=gpu)
        table = Parallel(cp=4).applied(long_engine(attention_s=40e-3), m)
        seconds[gpu] = table.chunk_s(0, 32768)
    # Attention over 32,768 tokens: 40 ms on one GPU, 10 ms on each of four; the ring as above.
    assert seconds["h100-sxm"] == pytest.approx(11.01e-3, rel=1e-3)
    assert seconds["l40s"] == pytest.approx(154.9e-3, rel=1e-3)
    hidden = Parallel(cp=4).applied(long_engine(attention_s=80e-3), model())
    assert hidden.chunk_s(0, 32768) == pytest.approx(20e-3, rel=1e-3)


def long_engine(attention_s: float) -> StepTable:
    table = engine(chunk=8192)
    lengths = np.arange(20.0) * 4096
    return StepTable(
        **{n: getattr(table, n) for n in table.__slots__
           if n not in ("prompt_s", "prefix_s", "prompt_shift")},
        prompt_s=(attention_s * (lengths / 32768) ** 2).tolist(), prefix_s=[0.0] * 20,
        prompt_shift=12,
    )  # fmt: skip


# Pools ---------------------------------------------------------------------------------------


def pools(model_name: str, method: str, tp: tuple[int, int] = (1, 1)) -> PairParts:
    plan_spec = spec(
        workload={"requests": 40, "input_tokens": 10_000, "output_tokens": 50, "rate_per_s": 1},
        candidates={"models": [model_name]},
    )
    one, two = (candidate(model=model_name, method=method, tp=n) for n in tp)
    found = screen_pair(Pair(prefill=one, decode=two), plan_spec, plan_spec.demand.requests())
    assert found.parts is not None, found.reason
    return found.parts


@pytest.mark.parametrize(
    ("name", "method", "tp", "milliseconds"),
    [
        # 10,000 x 131,072 bytes at 50 GB/s x 0.65, and 1 ms to set up
        ("llama-3.1-8b", "full", (1, 1), 41.33),
        ("llama-3.1-8b", "fp8_kv", (1, 1), 21.16),
        # 0.375 bytes for each of 65,536 elements a token, and residuals of 16 keys and 128 values
        ("llama-3.1-8b", "kivi", (1, 1), 8.85),
        # 4,096 tokens are left
        ("llama-3.1-8b", "snapkv:keep_tokens=4096", (1, 1), 17.52),
        # Two senders share it; one receiver among them does not.
        ("llama-3.1-8b", "full", (2, 2), 21.16),
        ("llama-3.1-8b", "full", (2, 1), 41.33),
        # 169.8 MB whatever the prompt
        ("mamba2-2.7b", "full", (1, 1), 6.23),
    ],
)
def test_state_sent_between_pools_by_hand(
    name: str, method: str, tp: tuple[int, int], milliseconds: float
) -> None:
    parts = pools(name, method, tp)
    assert parts.transfer_s.mean() * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_prompts_of_one_replica_are_sent_one_after_another() -> None:
    # Done at 0, 0.5 and 5 s, a second each: they arrive at 1, 2 and 6 s; alone on another at 1.5.
    done, transfer = np.array([0.0, 0.5, 5.0, 0.5]), np.ones(4)
    assert sent_s(done, np.array([0, 0, 0, 1]), transfer).tolist() == [1.0, 2.0, 6.0, 1.5]


def test_the_network_bounds_a_prefill_pool() -> None:
    parts = pools("llama-3.1-8b", "full")
    assert parts.prompt_rate_per_s == parts.prompt_bound.rate_per_s  # 41 ms hide behind prefill
    slow = PairParts(
        **{n: getattr(parts, n) for n in parts.__slots__ if n != "transfer_s"},
        transfer_s=np.full(40, 2.0),
    )
    assert slow.prompt_rate_per_s == pytest.approx(0.5)
