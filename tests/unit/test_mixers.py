"""Mixers against numbers worked by hand or by counting one by one."""

from typing import Literal

import numpy as np
import pytest

from costmodel.engines import load_engine
from costmodel.errors import NotApplicableError
from costmodel.mixers.attention import Attention
from costmodel.mixers.base import AbstractMixer
from costmodel.mixers.compressed import CompressedAttention, entry_pairs
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.lightning import Lightning
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA, SparseIndex
from costmodel.mixers.rglru import RGLRU
from costmodel.mixers.rwkv5 import RWKV5
from costmodel.operation import Operation
from costmodel.workload import Point

GQA = Attention(n_heads=8, n_kv_heads=2, head_dim=16, v_head_dim=16)
V3 = MLA(
    n_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
V32 = MLA(
    n_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index=SparseIndex(n_heads=64, head_dim=128, top_k=2048),
)
CSA = CompressedAttention(
    n_heads=64,
    head_dim=512,
    rope_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_rank=1024,
    window_tokens=128,
    ratio=4,
    index_heads=64,
    index_dim=128,
    top_k=512,
)
MAMBA = Mamba(d_inner=5120, d_state=16, dt_rank=160, conv_kernel=4)
CODESTRAL = Mamba2(n_heads=128, head_dim=64, d_state=128, n_groups=8, conv_kernel=4)
GDN = DeltaRule(
    form="gdn", n_key_heads=16, n_value_heads=32, key_dim=128, value_dim=128, conv_kernel=4
)
KDA = DeltaRule(
    form="kda", n_key_heads=32, n_value_heads=32, key_dim=128, value_dim=128, conv_kernel=4
)
EAGLE = RWKV5(n_heads=64, head_dim=64, shift_dim=4096)
GRIFFIN = RGLRU(width=4096, n_blocks=16, conv_kernel=4)
LIGHTNING = Lightning(n_heads=64, head_dim=128)
ALL: dict[str, AbstractMixer] = {
    "attention": GQA,
    "mla": V3,
    "dsa": V32,
    "csa": CSA,
    "mamba": MAMBA,
    "mamba2": CODESTRAL,
    "gdn": GDN,
    "kda": KDA,
    "rwkv5": EAGLE,
    "rglru": GRIFFIN,
    "lightning": LIGHTNING,
}
FIXED = [name for name, m in ALL.items() if not m.HAS_KV]


def at(
    tokens: float | list[float],
    *,
    batch: float = 1.0,
    kv_dtype: str = "bf16",
    level: Literal["ideal", "reference"] = "ideal",
    engine: str = "lccost",
) -> Point:
    n = np.asarray(tokens, dtype=np.float64)
    return Point(
        batch=batch,
        prompt_tokens=n,
        cached_tokens=n,
        reserved_tokens=n,
        dtype="bf16",
        kv_dtype=kv_dtype,
        level=level,
        engine=load_engine(engine),
    )


def named(operations: tuple[Operation, ...], name: str) -> Operation:
    found = [op for op in operations if op.name == name]
    assert len(found) == 1, [op.name for op in operations]
    return found[0]


# Latent attention ------------------------------------------------------------------------------


def test_mla_keeps_576_elements_and_reads_them_once_for_all_heads() -> None:
    op = named(V3.decode(at(1000, batch=3)), "mla_attention")
    assert V3.state_bytes(at(1000, batch=3)) == 3 * 1000 * 576 * 2
    assert op.state_bytes == 3 * 1001 * 576 * 2  # the new token is written
    assert op.flops == 3 * 1000 * 278_528  # 2 * 128 * (576 + 512) per token
    assert op.shape["kv_bytes"] == 3 * 1000 * 576 * 2


def test_mla_prefill_is_expanded_and_causal() -> None:
    op = named(V3.prefill(at(4)), "mla_attention")
    assert op.flops == 10 * 2 * 128 * (192 + 128)
    square = named(V3.prefill(at(4, level="reference")), "mla_attention")
    assert square.counted_flops == 16 * 2 * 128 * (192 + 128)
    assert square.flops == op.flops


def test_the_index_is_seventeen_times_cheaper_per_token_than_dense_latents() -> None:
    at_64k = at(65536)
    score = named(V32.decode(at_64k), "index_score")
    attention = named(V32.decode(at_64k), "mla_attention")
    assert score.flops == 65536 * 16_384
    assert attention.flops == 2048 * 278_528
    assert attention.state_bytes == 2049 * 1152
    fp8 = at(65536, kv_dtype="fp8")
    read = sum(op.state_bytes for op in V32.decode(fp8))
    assert read == 65537 * 132 + 2049 * 656


def test_an_indexed_prompt_attends_to_at_most_top_k() -> None:
    """2048 rows of the triangle, then 2048 keys for each later query."""
    op = named(V32.prefill(at(5000)), "mla_attention")
    pairs = 2048 * 2049 / 2 + (5000 - 2048) * 2048
    assert op.flops == pairs * 2 * 128 * 320
    assert op.counted_flops == pairs * 278_528  # sparse kernels run in latent space
    short = named(V32.prefill(at(2048)), "mla_attention")
    assert short.counted_flops == short.flops
    assert named(V32.prefill(at(5000)), "index_score").flops == 5000 * 5001 / 2 * 16_384


def test_layers_that_reuse_an_index_have_no_keys_and_no_scores() -> None:
    mixer = MLA(
        n_heads=4, q_lora_rank=8, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, index=SparseIndex(n_heads=2, head_dim=8, top_k=5, owns_keys=False),
    )  # fmt: skip
    assert mixer.state_bytes(at(10)) == 10 * 20 * 2
    assert [op.name for op in mixer.decode(at(10))] == ["mla_attention"]
    assert mixer.decode(at(10))[0].state_bytes == 6 * 20 * 2


def test_transformers_expands_the_latents_at_every_step() -> None:
    op = named(V3.decode(at(1000, engine="transformers")), "expand_latents")
    assert op.executed_flops == 2 * 1000 * 512 * 128 * 256
    assert op.flops == 0


# Compressed attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("ratio", [1, 4, 7])
def test_entry_pairs_count_what_each_query_sees(ratio: int, top_k: int | None) -> None:
    for n in range(1, 60):
        seen = [t // ratio if top_k is None else min(t // ratio, top_k) for t in range(1, n + 1)]
        assert entry_pairs(n, ratio, top_k) == sum(seen)


def test_compressed_layers_read_window_and_chosen_entries() -> None:
    op = named(CSA.decode(at(100_000)), "compressed_attention")
    assert op.flops == (128 + 512) * 4 * 512 * 64
    assert op.state_bytes == (128 + 512 + 1) * 1024
    score = named(CSA.decode(at(100_000)), "index_score")
    assert score.flops == 25_000 * 2 * 64 * 128


# Recurrent mixers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state_bytes"),
    [
        ("mamba", 5120 * 16 * 4 + 3 * 5120 * 2),
        ("mamba2", 128 * 64 * 128 * 4 + 3 * (8192 + 2 * 8 * 128) * 2),
        ("gdn", 32 * 128 * 128 * 4 + 3 * 8192 * 2),
        ("kda", 32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2),
        ("rwkv5", 64 * 64 * 64 * 4 + 2 * 4096 * 2),
        ("rglru", 4096 * 4 + 3 * 4096 * 2),
        ("lightning", 64 * 128 * 128 * 4),
    ],
)
def test_fixed_states(name: str, state_bytes: int) -> None:
    mixer = ALL[name]
    for tokens in (1, 100_000):
        assert mixer.state_bytes(at(tokens, batch=5)) == 5 * state_bytes


def test_transformers_keeps_one_more_convolution_column() -> None:
    extra = MAMBA.state_bytes(at(9, engine="transformers")) - MAMBA.state_bytes(at(9))
    assert extra == 5120 * 2


@pytest.mark.parametrize("name", FIXED)
def test_a_step_reads_and_writes_the_state_whatever_the_context(name: str) -> None:
    mixer = ALL[name]
    steps = [op for op in mixer.decode(at([10, 10_000])) if op.kind == "scan_step"]
    assert len(steps) == 1
    assert np.all(steps[0].state_bytes == 2 * np.asarray(steps[0].shape["state_bytes"]))
    assert np.ndim(steps[0].flops) == 0 or np.ptp(np.asarray(steps[0].flops)) == 0


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("mamba", 2 * 5120 * 16),  # readout
        ("mamba2", 4 * 8192 * 128),  # outer product and readout
        ("gdn", 6 * 32 * 128 * 128),  # prediction, outer product, readout
        ("rwkv5", 4 * 4096 * 64),
        ("rglru", 0),  # elementwise
        ("lightning", 4 * 64 * 128 * 128),
    ],
)
def test_useful_work_of_the_recurrence(name: str, per_token: int) -> None:
    mixer = ALL[name]
    step = next(op for op in mixer.decode(at(7, batch=2)) if op.kind == "scan_step")
    prompt = next(op for op in mixer.prefill(at(1000, batch=2)) if op.kind == "scan_prefill")
    assert step.flops == 2 * per_token
    assert prompt.flops == 2 * 1000 * per_token
    assert np.all(np.asarray(prompt.counted_flops) >= np.asarray(prompt.flops))


def test_mamba2_runs_chunks() -> None:
    """Codestral, 512 tokens in 2 chunks of 256: 2 c N G + 2 c E + 4 E N per token."""
    op = named(CODESTRAL.prefill(at(512)), "ssd_chunk_scan")
    per_token = 2 * 256 * 128 * 8 + 2 * 256 * 8192 + 4 * 8192 * 128
    assert op.counted_flops == 512 * per_token
    padded = named(CODESTRAL.prefill(at(300)), "ssd_chunk_scan")
    assert padded.counted_flops == 512 * per_token
    states = 2 * 8192 * 128 * 4 + 2 * 8 * 256 * 256 * 4
    assert op.workspace_bytes == 2 * states


def test_delta_rule_runs_chunks_of_64() -> None:
    op = named(GDN.prefill(at(128)), "chunk_gated_delta_rule")
    per_head = 6 * 64 * 128 + 4 * 64 * 128 + 64 * 64 / 3 + 6 * 128 * 128
    assert op.counted_flops == pytest.approx(128 * 32 * per_head, rel=1e-12)


def test_griffin_gates_are_block_diagonal() -> None:
    gates = named(GRIFFIN.prefill(at(10)), "rglru_gates")
    assert gates.flops == 10 * 2 * (2 * 16 * 256 * 256)


def test_convolutions_are_useful_work() -> None:
    conv = named(MAMBA.prefill(at(100)), "causal_conv1d")
    assert conv.flops == 100 * 2 * 4 * 5120


# Tensor parallelism ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL))
def test_shards_together_hold_every_sharded_matrix(name: str) -> None:
    mixer = ALL[name]
    whole = {x.name: x.n_in * x.n_out for x in mixer.linears(4096)}
    shard = {x.name: x.n_in * x.n_out for x in mixer.sharded(2).linears(4096)}
    assert shard.keys() == whole.keys()
    for key, elements in shard.items():
        assert elements in (whole[key], whole[key] // 2), key
    assert min(shard.values()) < min(whole.values()) or sum(shard.values()) < sum(whole.values())


@pytest.mark.parametrize("name", [n for n in FIXED if n != "rwkv5"])
def test_a_recurrent_state_divides(name: str) -> None:
    mixer = ALL[name]
    assert mixer.sharded(2).state_bytes(at(9)) == mixer.state_bytes(at(9)) / 2


def test_latents_replicate_and_kv_heads_replicate_below_tp() -> None:
    assert V3.sharded(8).state_bytes(at(9)) == V3.state_bytes(at(9))
    assert GQA.sharded(8).state_bytes(at(9)) == GQA.state_bytes(at(9)) / 2


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_does_not_divide_is_refused(name: str) -> None:
    with pytest.raises(NotApplicableError, match="3"):
        ALL[name].sharded(3)
