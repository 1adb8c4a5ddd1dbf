"""The bridge for mixers: what is held, stored and multiplied equals the cost model, to the byte.

Every runnable mixer x batch x dtype x contexts around windows, chunks and convolution kernels; the
contexts are found by hypothesis, the boundaries are given. Methods have ``test_bridge``.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from costmodel.architecture import Architecture, Layer
from costmodel.engines import load_engine
from costmodel.errors import NotApplicableError
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.lightning import Lightning
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.mla import MLA
from costmodel.mixers.rglru import RGLRU
from costmodel.mixers.rwkv5 import RWKV5
from costmodel.mlps import DenseMLP, MoE
from costmodel.registry import load_architecture, model_names
from costmodel.workload import Point
from measure.blocks import blocks_of, check_supported
from measure.config_numerics import numerics_of
from measure.engine import (
    TORCH_DTYPES,
    Decoder,
    Numerics,
    random_weights,
)
from measure.flops import count_flops
from measure.mixers import build_cache

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

D, V, F, WINDOW = 32, 40, 48, 8
GQA = Attention(n_heads=4, n_kv_heads=2, head_dim=8, v_head_dim=8)
MIXERS = {
    "full": GQA,
    "wide-values": replace(GQA, v_head_dim=16),
    "window": replace(GQA, window_tokens=WINDOW),
    "chunk": replace(GQA, chunk_tokens=WINDOW),
    "gated": replace(GQA, output_gate=True, qkv_bias=True, o_bias=True),
    "mla": MLA(
        n_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
    ),
    "mamba": Mamba(d_inner=48, d_state=4, dt_rank=3, conv_kernel=4),
    "mamba2": Mamba2(n_heads=6, head_dim=8, d_state=16, n_groups=2, conv_kernel=4, chunk_tokens=8),
    "rglru": RGLRU(width=32, n_blocks=4, conv_kernel=4),
    "gdn": DeltaRule(
        form="gdn", n_key_heads=2, n_value_heads=4, key_dim=8, value_dim=12, conv_kernel=4
    ),
    "kda": DeltaRule(
        form="kda", n_key_heads=4, n_value_heads=4, key_dim=8, value_dim=8, conv_kernel=4
    ),
    "lightning": Lightning(n_heads=4, head_dim=8, block_tokens=8),
    "rwkv5": RWKV5(n_heads=4, head_dim=8, shift_dim=D),
}
NUMERICS = Numerics()


def decoder_of(mixer, mlp=None, layers=2) -> Architecture:
    layer = Layer(
        mixers=(mixer,),
        mlps=() if mlp is None else (mlp,),
        other_parameters=D if mlp is None else 2 * D,
    )
    return Architecture(
        name="tiny",
        hub_id="tiny",
        family="tiny",
        d_model=D,
        vocab_size=V,
        layers=(layer,) * layers,
        other_parameters=D,
        tied_embeddings=True,
    )


def point(batch, prompt, cached, dtype="fp32") -> Point:
    return Point(
        batch=float(batch),
        prompt_tokens=float(prompt),
        cached_tokens=float(cached),
        reserved_tokens=float(cached),
        dtype=dtype,
        kv_dtype=dtype,
        level="ideal",
        engine=load_engine("torch"),
    )


def caches_of(model, batch, dtype="fp32", reserve_tokens=0):
    return [
        build_cache(
            parse_method("full"),
            mixer,
            batch=batch,
            dtype=TORCH_DTYPES[dtype],
            device=torch.device("cpu"),
            reserve_tokens=reserve_tokens,
        )
        for layer in model.layers
        for mixer in layer.mixers
    ]


def built(mixer, dtype="fp32", mlp=None):
    model = decoder_of(mixer, mlp)
    weights = random_weights(model, TORCH_DTYPES[dtype], torch.device("cpu"), numerics=NUMERICS)
    return model, Decoder(model, weights, n_positions=64, numerics=NUMERICS)


@pytest.mark.parametrize("name", MIXERS)
@settings(max_examples=8, deadline=None)
@given(batch=st.integers(1, 4), context=st.integers(1, 40), dtype=st.sampled_from(["bf16", "fp32"]))
@example(batch=1, context=1, dtype="bf16")
@example(batch=2, context=WINDOW - 2, dtype="bf16")
@example(batch=2, context=WINDOW + 1, dtype="fp32")
@example(batch=3, context=2 * WINDOW - 1, dtype="bf16")
def test_storages_equal_the_predicted_state(name, batch, context, dtype):
    mixer = MIXERS[name]
    model, decoder = built(mixer, dtype)
    caches = caches_of(model, batch, dtype)
    decoder.prefill(torch.zeros(batch, context, dtype=torch.long), caches)
    for cached in range(context, context + 4):
        predicted = float(mixer.state_bytes(point(batch, context, cached, dtype)))
        assert [c.storage_bytes for c in caches] == [predicted, predicted]
        assert {c.n_tokens for c in caches} == {cached}
        decoder.decode(torch.zeros(batch, 1, dtype=torch.long), caches)
    filled = caches_of(model, batch, dtype)[0]
    filled.fill(context)
    assert filled.storage_bytes == float(mixer.state_bytes(point(batch, context, context, dtype)))


@pytest.mark.parametrize("name", MIXERS)
def test_a_prompt_equals_its_tokens_one_by_one_and_steps_can_be_undone(name):
    model, decoder = built(MIXERS[name])
    tokens = torch.randint(V, (2, 21), generator=torch.Generator().manual_seed(0))
    whole, steps = caches_of(model, 2), caches_of(model, 2, reserve_tokens=21)
    expected = decoder.prefill(tokens, whole)
    decoder.prefill(tokens[:, :1], steps)
    for t in range(1, 21):
        snapshots = [c.snapshot() for c in steps]
        decoder.decode(torch.zeros(2, 1, dtype=torch.long), steps)  # a wrong token, undone
        for cache, snapshot in zip(steps, snapshots, strict=True):
            cache.restore(snapshot)
        found = decoder.decode(tokens[:, t : t + 1], steps)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


#: Mixers whose steps and prompts run exactly the matmuls that are predicted.
EXACT_STEPS = ("full", "gated", "window", "mamba", "mamba2", "rglru", "gdn", "kda", "lightning")


@pytest.mark.parametrize("name", EXACT_STEPS)
def test_counted_flops_of_a_step_equal_the_prediction(name):
    mixer, mlp, batch, context = MIXERS[name], DenseMLP(d_ff=F), 2, 19
    model, decoder = built(mixer, mlp=mlp)
    caches = caches_of(model, batch)
    decoder.prefill(torch.zeros(batch, context, dtype=torch.long), caches)
    counted = count_flops(lambda: decoder.decode(torch.zeros(batch, 1, dtype=torch.long), caches))
    mixing = sum(op.count * op.counted_flops for op in mixer.decode(point(batch, context, context)))
    matrices = sum(2.0 * x.n_in * x.n_out * n for x, n in model.linear_groups)
    assert counted == 2 * float(mixing) + batch * (matrices + 2.0 * D * V)


@pytest.mark.parametrize("name", ["mamba2", "rglru", "mamba", "lightning"])
@pytest.mark.parametrize("context", [5, 16, 19])
def test_counted_flops_of_a_prompt_equal_the_prediction(name, context):
    mixer, batch = MIXERS[name], 2
    model, decoder = built(mixer)
    caches = caches_of(model, batch)
    counted = count_flops(
        lambda: decoder.prefill(torch.zeros(batch, context, dtype=torch.long), caches)
    )
    mixing = sum(
        op.count * op.counted_flops for op in mixer.prefill(point(batch, context, context))
    )
    matrices = sum(2.0 * x.n_in * x.n_out * n for x, n in model.linear_groups)
    assert counted == 2 * float(mixing) + batch * (context * matrices + 2.0 * D * V)


MLPS = {
    "gated": DenseMLP(d_ff=F, bias=True),
    "plain": DenseMLP(d_ff=F, gated=False),
    "experts": MoE(n_experts=5, top_k=2, d_ff=8, shared_d_ff=16, shared_gate=True),
    "biased-experts": MoE(n_experts=4, top_k=1, d_ff=8, expert_bias=True, router_bias=4),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mlp", MLPS)
def test_random_weights_hold_what_the_architecture_counts(mixer, mlp):
    model = decoder_of(MIXERS[mixer], MLPS[mlp])
    weights = random_weights(model, torch.bfloat16, torch.device("cpu"), numerics=NUMERICS)
    assert weights.nbytes == 2 * model.n_parameters


def test_a_visited_expert_costs_what_top_k_says():
    model, decoder = built(GQA, mlp=MLPS["experts"])
    caches = caches_of(model, 1)
    counted = count_flops(lambda: decoder.prefill(torch.zeros(1, 1, dtype=torch.long), caches))
    attention = 2 * 2 * (8 + 8) * 4  # layers, multiply-add, head sizes, heads; one pair
    experts = 2 * 2 * 2 * (3 * D * 8)  # layers, top-k, multiply-add, three matrices
    matrices = sum(2.0 * x.n_in * x.n_out * n for x, n in model.linear_groups)
    assert counted == attention + experts + matrices + 2.0 * D * V


#: At least one bundled model of every family that is proved against transformers.
RUNS = {
    *("llama-3.1-8b", "mistral-7b-v0.1", "qwen2.5-7b", "qwen3-8b", "gemma-2-2b", "gemma-3-1b"),
    *("mixtral-8x7b", "gpt-oss-20b", "mamba2-2.7b", "mamba-2.8b", "recurrentgemma-2b"),
    *("deepseek-v3", "deepseek-v2-lite", "jamba-v0.1", "qwen3-next-80b-a3b", "qwen3-30b-a3b"),
    *("rwkv-5-world-7b", "nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "llama-4-scout"),
    *("falcon-h1-1.5b", "minimax-text-01", "zamba2-2.7b"),
}


def counted_parameters(model: Architecture) -> int:
    numerics = numerics_of(model.family)
    outer = (1 + numerics.layer_norm) * (1 + numerics.first_norm)
    total = ((1 if model.tied_embeddings else 2) * model.vocab_size + outer) * model.d_model
    shared = {}
    for block, layer in zip(blocks_of(model, numerics), model.layers, strict=True):
        if block.shared is not None:
            shared[layer.shared_with] = block.shared.shapes(model.d_model)
            total += sum(math.prod(x.sizes) for x in block.shared.own_shapes().values())
        total += len(block.norms(numerics)) * model.d_model
        for part in (*block.mixers, block.mlp):
            shapes = {} if part is None else part.shapes(model.d_model)
            total += sum(math.prod(shape.sizes) for shape in shapes.values())
    return total + sum(math.prod(x.sizes) for part in shared.values() for x in part.values())


def test_bundled_models_run_with_exactly_their_parameters():
    run = set()
    for name in model_names():
        model = load_architecture(name)
        try:
            check_supported(model)
        except NotApplicableError:
            continue
        assert counted_parameters(model) == model.n_parameters, name
        run.add(name)
    assert run >= RUNS
