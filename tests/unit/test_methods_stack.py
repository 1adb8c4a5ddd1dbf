"""Stacks: composition, prompts, and where a method is full attention."""

import numpy as np
import pytest
from method_points import attention, group, model, named, point, state_bytes, total

from costmodel.errors import NotApplicableError
from costmodel.methods import method_class, method_names
from costmodel.methods.llmlingua2 import ENCODER_PARAMETERS
from costmodel.methods.parse import parse_method
from costmodel.methods.stack import MethodStack

_STEP = 8 * 256 * 2  # one token of K and V in one Llama-3-8B layer


# What results print ----------------------------------------------------------------------------


def test_names_and_parameters_of_compositions() -> None:
    stack = parse_method("llmlingua2:preset=6x+kivi:bits=4")
    assert stack.name == "llmlingua2+kivi"
    assert stack.spec == "llmlingua2:preset=6x+kivi:bits=4"
    assert stack.resolved(6000).parameters == {
        "llmlingua2": {"rate": 1 / 6, "preset": None},
        "kivi": {"bits": 4, "group": 32, "residual_tokens": 128},
    }
    assert parse_method("kivi").parameters == {"bits": 2, "group": 32, "residual_tokens": 128}


def test_presets_behind_prompt_compression_see_the_shorter_prompt() -> None:
    alone = parse_method("streaming_llm:preset=2x").resolved(3750)
    both = parse_method("llmlingua2+streaming_llm:preset=2x").resolved(7500)
    assert both.methods[1] == alone.methods[0]


def test_resolved_presets_price_the_same() -> None:
    for spec in ("h2o:preset=4x", "streaming_llm:preset=6x", "infllm:preset=2x"):
        stack = parse_method(spec)
        where = point(20_000, 20_050)
        resolved = stack.resolved(20_000)
        assert float(resolved.state(group(), where).device) == state_bytes(spec, where)
        for ours, theirs in (
            (stack.prefill(group(), where), resolved.prefill(group(), where)),
            (stack.decode(group(), where), resolved.decode(group(), where)),
        ):
            assert [op.name for op in ours] == [op.name for op in theirs]
            assert total(ours, "hbm_bytes") == total(theirs, "hbm_bytes")
            assert total(ours, "counted_flops") == total(theirs, "counted_flops")


def test_presets_take_arrays_of_contexts() -> None:
    prompts = np.array([5_000.0, 7_500.0, 31_500.0])
    for spec in ("h2o:preset=8x", "streaming_llm:preset=4x", "infllm:preset=4x"):
        state = parse_method(spec).state(group(), point(prompts))
        assert list(state.device) == [state_bytes(spec, point(p)) for p in prompts]


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(NotApplicableError, match="at least one method"):
        MethodStack(())


def test_refusal_of_a_composition_is_that_of_its_parts() -> None:
    latent_free = model(attention(8, 8, 80), name="phi-like")
    assert parse_method("llmlingua2").refusal(latent_free) is None
    assert parse_method("llmlingua2+kivi").refusal(latent_free) == parse_method("kivi").refusal(
        latent_free
    )


# Composition -----------------------------------------------------------------------------------


def test_sparse_prefill_then_quantisation() -> None:
    where = point(100_000)
    both = parse_method("minference+kivi").prefill(group(), where)
    names = [op.name for op in both]
    assert names == ["index_scores", "select_pattern", "sparse_attention", "quantise"]
    alone = parse_method("minference").prefill(group(), where)
    assert total(both, "flops") == total(alone, "flops")
    # what is cached is the packed state, not K and V
    packed = state_bytes("kivi", where) / 32
    assert total(both, "state_bytes") == packed
    assert state_bytes("minference+kivi", where) == state_bytes("kivi", where)


def test_quantising_what_an_eviction_left() -> None:
    # kvpress notebook: Knorm 0.5 and 0.8 over a quanto int4 cache of 128,000 tokens, off a plot
    for kept, gib in ((0.5, 2.2), (0.2, 0.9)):
        size = state_bytes(f"knorm:kept_fraction={kept}+hf_quanto", point(128_000))
        assert size / 2**30 == pytest.approx(gib, rel=0.03)
    both = parse_method("snapkv+kivi")
    where = point(10_000, 10_300)
    assert state_bytes("snapkv+kivi", where) == state_bytes("kivi", point(2048, 2348))
    decode = named(both.decode(group(), where), "attention")
    assert float(decode.shape["kv_len"]) == 2348
    quantise = named(both.prefill(group(), where), "quantise")
    assert float(quantise.shape["elements"]) == (2048 + 1920) * 8 * 128


def test_prompt_compression_leaves_the_model_as_it_is() -> None:
    stack = parse_method("llmlingua2:rate=0.25")
    assert float(stack.prompt_tokens(10_001.0)) == 2500
    assert float(stack.prompt_tokens(1.0)) == 1
    assert float(parse_method("llmlingua2:preset=6x").prompt_tokens(6.0)) == 1
    where = point(2500)
    full = parse_method("full")
    assert total(stack.prefill(group(), where), "flops") == total(
        full.prefill(group(), where), "flops"
    )
    assert float(stack.state(group(), where).device) == state_bytes("full", where)


# The encoder of LLMLingua-2 ---------------------------------------------------------------------


def test_encoder_is_xlm_roberta_large() -> None:
    # XLMRobertaModel large has 559,890,432 parameters, 1,049,600 of them in a pooler; the
    # classifier has none and adds 2 * 1024 + 2
    assert ENCODER_PARAMETERS == 559_890_432 - 1_049_600 + 2_050
    assert parse_method("llmlingua2").prompt_weights_bytes() == 2.0 * ENCODER_PARAMETERS


@pytest.mark.parametrize(("prompt", "batch"), [(510, 1), (1020, 3), (510 * 120, 1)])
def test_encoder_flops(prompt: int, batch: int) -> None:
    operations = parse_method("llmlingua2").prompt_operations(point(prompt, batch=batch))
    chunks = batch * prompt // 510
    per_chunk = 24 * (2 * 512 * 12 * 1024**2 + 4 * 512**2 * 1024) + 2 * 512 * 2 * 1024
    assert float(total(operations, "flops")) == pytest.approx(chunks * per_chunk, rel=1e-12)
    # about 6.3e11 per 1,000 tokens
    assert per_chunk / 510 * 1000 == pytest.approx(6.3e11, rel=0.05)


def test_upstream_pads_every_chunk() -> None:
    stack = parse_method("llmlingua2")
    # 511 tokens are two chunks: 512 and 3 tokens, or 512 twice
    padded = total(stack.prompt_operations(point(511, level="reference")), "flops")
    exact = total(stack.prompt_operations(point(511)), "flops")
    linear, square = 24 * 2 * 12 * 1024**2 + 2 * 2 * 1024, 24 * 4 * 1024
    assert float(padded) == linear * 1024 + square * 2 * 512**2
    assert float(exact) == linear * 515 + square * (512**2 + 3**2)


def test_encoder_reads_its_weights_once_per_50_chunks() -> None:
    stack = parse_method("llmlingua2")
    once = total(stack.prompt_operations(point(510 * 50)), "weight_bytes")
    assert float(once) == (24 * 12 * 1024**2 + 2 * 1024) * 2
    assert float(total(stack.prompt_operations(point(510 * 51)), "weight_bytes")) == 2 * once


def test_rate_one_is_full() -> None:
    stack = parse_method("llmlingua2:rate=1")
    assert stack.prompt_operations(point()) == ()
    assert stack.prompt_weights_bytes() == 0
    assert float(stack.prompt_tokens(777.0)) == 777
    assert np.all(stack.equals_full(777.0))


# Where a method is full attention ---------------------------------------------------------------

_HOLDS_ALL = [
    "h2o:heavy_fraction=0.5,recent_fraction=0.5",
    "h2o:variant=mask,heavy_fraction=1",
    "streaming_llm:window_tokens=64k",
    "streaming_llm:window_tokens=64k,positions=fixed",
    "infllm:local_tokens=64k",
    "snapkv:keep_tokens=64k",
    "pyramidkv:keep_tokens=64k",
    "tova:keep_tokens=64k",
    "quest:keep_tokens=64k",
    "minference:kept_tokens=64k",
    "kv_offload:resident_layers=32",
    "knorm:kept_fraction=1",
    "llmlingua2:rate=1",
    "llmlingua2:rate=1+snapkv:keep_tokens=64k",
]


@pytest.mark.parametrize("level", ["ideal", "reference"])
@pytest.mark.parametrize("spec", _HOLDS_ALL)
def test_budgets_of_the_whole_context_equal_full(spec: str, level: str) -> None:
    architecture = model(*[attention()] * 32)
    stack, full, layers = parse_method(spec), parse_method("full"), group()
    assert np.all(stack.equals_full(10_000, architecture))
    where = point(10_000, level=level)
    state = stack.state(layers, where)
    assert float(state.device) == state_bytes("full", where)
    assert float(np.max(state.host)) == 0
    for ours, theirs in (
        (stack.prefill(layers, where), full.prefill(layers, where)),
        (stack.decode(layers, where), full.decode(layers, where)),
    ):
        assert [op.name for op in ours] == [op.name for op in theirs]
        for amount in ("flops", "counted_flops", "vector_flops", "hbm_bytes", "link_bytes"):
            assert total(ours, amount) == total(theirs, amount)


def test_mixed_arrays_are_full_exactly_where_the_budget_holds() -> None:
    prompts = np.array([500.0, 2048.0, 2049.0, 9000.0])
    for spec in ("snapkv", "tova", "quest", "pyramidkv", "streaming_llm", "infllm", "minference"):
        stack = parse_method(spec)
        mixed = point(prompts, prompts + 100)
        for hook in (stack.prefill, stack.decode):
            together = total(hook(group(), mixed), "hbm_bytes")
            peaks = np.max(
                [np.broadcast_to(op.transient_bytes, 4) for op in hook(group(), mixed)], axis=0
            )
            for i, prompt in enumerate(prompts):
                one = hook(group(), point(prompt, prompt + 100))
                assert together[i] == pytest.approx(float(total(one, "hbm_bytes")), rel=1e-12)
                assert peaks[i] == max(float(op.transient_bytes) for op in one)


def test_equals_full_is_elementwise() -> None:
    assert list(parse_method("snapkv").equals_full(np.array([2048.0, 2049.0]))) == [True, False]
    assert not np.any(parse_method("kivi").equals_full(np.array([1.0, 1e6])))
    assert np.all(parse_method("full").equals_full(np.array([1.0, 1e6])))
    # without a model it is not known how many layers there are
    assert not np.any(parse_method("kv_offload:resident_layers=99").equals_full(1000))


# Levels -------------------------------------------------------------------------------------------

_ALL = [n for n in method_names() if n not in ("full", "llmlingua2")] + [
    "h2o:variant=real_drop",
    "h2o:variant=mask",
    "streaming_llm:positions=fixed",
]


@pytest.mark.parametrize("spec", _ALL)
def test_reference_operations_cite_their_source(spec: str) -> None:
    stack, where = parse_method(spec), point(50_000, 50_100, level="reference")
    native = {op.name for op in parse_method("full").prefill(group(), where)} | {
        op.name for op in parse_method("full").decode(group(), where)
    }
    operations = stack.prefill(group(), where) + stack.decode(group(), where)
    for op in operations:
        assert op.formula, op.name
        if op.name not in native:
            assert op.source, op.name


@pytest.mark.parametrize(
    ("spec", "n_operations"),
    [("kivi", 7), ("flexgen", 6), ("h2o", 5), ("streaming_llm", 6), ("tova", 7), ("infllm", 8)],
)
def test_reference_is_a_chain_of_operations(spec: str, n_operations: int) -> None:
    where = point(50_000, 50_100, level="reference")
    assert len(parse_method(spec).decode(group(), where)) == n_operations
    assert len(parse_method(spec).decode(group(), point(50_000, 50_100))) < n_operations


@pytest.mark.parametrize("spec", _ALL)
def test_operations_carry_the_shape_their_time_model_needs(spec: str) -> None:
    needed = {
        "gemm": {"m", "n", "k"},
        "prefill_attention": {
            "batch",
            "q_len",
            "kv_len",
            "pairs",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "v_head_dim",
        },
        "decode_attention": {
            "batch",
            "kv_len",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "v_head_dim",
            "kv_bytes",
        },
        "select": {"rows", "length", "k"},
        "host_link": {"message_bytes", "pinned"},
    }
    for level in ("ideal", "reference"):
        where = point(50_000, 50_100, level=level)
        stack = parse_method(spec)
        for op in stack.prefill(group(), where) + stack.decode(group(), where):
            assert needed.get(op.kind, set()) <= set(op.shape), op.name
            if op.kind == "decode_attention":
                assert np.all(np.asarray(op.shape["kv_bytes"]) > 0), op.name


@pytest.mark.parametrize("name", ["gear", "hf_quanto", "hf_hqq", "kivi", "flexgen", "fp8_kv"])
def test_a_step_of_a_quantiser_writes_one_token(name: str) -> None:
    where = point(10_000)
    decode = parse_method(name).decode(group(), where)
    read = state_bytes(name, where) / 32
    moved = total(decode, "state_bytes")
    assert read < moved <= read + 4 * _STEP


def test_every_method_is_one_file_of_its_name() -> None:
    for name in method_names():
        assert method_class(name).__module__ == f"costmodel.methods.{name}"
