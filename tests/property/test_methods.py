"""What must hold for every method, whatever the layer and the point."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_points import attention, group, point, total

from costmodel.architecture import MixerGroup
from costmodel.methods import method_names
from costmodel.methods.parse import parse_method
from costmodel.workload import Point

_SPECS = [
    *method_names(),
    "kivi:bits=4",
    "h2o:variant=real_drop",
    "h2o:variant=mask",
    "h2o:preset=8x",
    "streaming_llm:positions=fixed",
    "streaming_llm:preset=4x",
    "infllm:preset=2x",
    "minference+snapkv+kivi",
    "knorm+hf_quanto",
]
#: Never larger than full attention, whatever the length (InfLLM has buffers, Quest metadata).
_SMALLER = [
    *("kivi", "kivi:bits=4", "flexgen", "h2o", "h2o:preset=8x", "streaming_llm", "snapkv"),
    *("streaming_llm:preset=4x", "tova", "knorm", "hf_quanto", "hf_hqq", "knorm+hf_quanto"),
]
#: The cache never shrinks while decoding (KIVI and others saw: a block is packed at once).
_GROWING = [
    *("full", "fp8_kv", "flexgen", "kvquant", "h2o", "h2o:variant=mask", "streaming_llm"),
    *("snapkv", "pyramidkv", "tova", "knorm", "quest", "kv_offload", "minference"),
]


@st.composite
def groups(draw: st.DrawFn) -> MixerGroup:
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    ratio = draw(st.sampled_from([1, 4]))
    dim = draw(st.sampled_from([64, 128, 256]))
    return group(attention(kv_heads * ratio, kv_heads, dim), draw(st.integers(1, 4)))


@st.composite
def points(draw: st.DrawFn, **fixed: Any) -> Point:
    prompt = draw(st.integers(1, 200_000))
    choices: dict[str, Any] = {
        "batch": draw(st.integers(1, 64)),
        "dtype": draw(st.sampled_from(["bf16", "fp32"])),
        "level": draw(st.sampled_from(["ideal", "reference"])),
    }
    return point(prompt, prompt + draw(st.integers(0, 2000)), **{**choices, **fixed})


@pytest.mark.parametrize("spec", _SPECS)
@given(layers=groups(), where=points())
@settings(max_examples=25)
def test_amounts_are_finite_and_consistent(spec: str, layers: MixerGroup, where: Point) -> None:
    stack = parse_method(spec)
    state = stack.state(layers, where)
    assert np.isfinite(state.device)
    assert float(state.device) >= 0
    assert float(state.host) >= 0
    if state.allocated is not None:
        assert float(state.allocated) >= float(state.device)
    for op in stack.prefill(layers, where) + stack.decode(layers, where):
        for amount in (
            *("count", "flops", "counted_flops", "vector_flops", "state_bytes", "launches"),
            *("workspace_bytes", "activation_bytes", "link_bytes", "transient_bytes"),
        ):
            value = float(getattr(op, amount))
            assert np.isfinite(value), (op.name, amount)
            assert value >= 0, (op.name, amount)
        assert float(op.counted_flops) >= float(op.flops) * (1 - 1e-12), op.name


@pytest.mark.parametrize("spec", _SPECS)
@given(layers=groups(), where=points())
@settings(max_examples=15)
def test_everything_is_affine_in_the_batch(spec: str, layers: MixerGroup, where: Point) -> None:
    # kvquant's codebooks and fp8's scales are stored once, whatever the batch
    stack = parse_method(spec)

    def amounts(batch: float) -> Any:
        at = point(where.prompt_tokens, where.cached_tokens, batch=batch, level=where.level)
        state = stack.state(layers, at)
        prefill, decode = stack.prefill(layers, at), stack.decode(layers, at)
        return np.array(
            [
                float(state.device),
                float(state.host),
                *(float(total(ops, "hbm_bytes")) for ops in (prefill, decode)),
                *(float(total(ops, "counted_flops")) for ops in (prefill, decode)),
                *(float(total(ops, "link_bytes")) for ops in (prefill, decode)),
            ]
        )

    one, two, three = (amounts(b) for b in (1.0, 2.0, 3.0))
    np.testing.assert_allclose(three - two, two - one, rtol=1e-9, atol=1e-3)


# published code may hold more: SnapKV's repeats K and V to all query heads
@pytest.mark.parametrize("spec", _SMALLER)
@given(layers=groups(), where=points(level="ideal"))
@settings(max_examples=25)
def test_state_is_at_most_full(spec: str, layers: MixerGroup, where: Point) -> None:
    full = parse_method("full").state(layers, where)
    assert float(parse_method(spec).state(layers, where).device) <= float(full.device)


@pytest.mark.parametrize("spec", _SPECS)
@given(layers=groups(), where=points(level="ideal"))
@settings(max_examples=25)
def test_a_step_reads_at_most_what_is_stored(spec: str, layers: MixerGroup, where: Point) -> None:
    stack = parse_method(spec)
    state = stack.state(layers, where)
    read = sum(
        float(op.count * op.shape["kv_bytes"])
        for op in stack.decode(layers, where)
        if op.kind == "decode_attention"
    )
    stored = float(state.device) + float(state.host)
    assert read * layers.n_layers <= stored * (1 + 1e-12)


@pytest.mark.parametrize("spec", _SPECS)
@given(layers=groups(), where=points(level="ideal"))
@settings(max_examples=25)
def test_reference_moves_at_least_the_ideal_bytes(
    spec: str, layers: MixerGroup, where: Point
) -> None:
    stack = parse_method(spec)
    upstream = point(
        where.prompt_tokens,
        where.cached_tokens,
        batch=where.batch,
        dtype=where.dtype,
        level="reference",
    )
    for hook in (stack.prefill, stack.decode):
        for amount in ("hbm_bytes", "link_bytes"):
            ideal, reference = (float(total(hook(layers, p), amount)) for p in (where, upstream))
            assert reference >= ideal * (1 - 1e-12), amount
        ideal, reference = (float(total(hook(layers, p), "flops")) for p in (where, upstream))
        assert reference == pytest.approx(ideal)  # useful work is a property of the method


@pytest.mark.parametrize("spec", _GROWING)
@given(layers=groups(), where=points())
@settings(max_examples=25)
def test_state_grows_with_the_cached_tokens(spec: str, layers: MixerGroup, where: Point) -> None:
    stack = parse_method(spec)
    more = where.at(where.cached_tokens + 1)
    assert float(stack.state(layers, more).device) >= float(stack.state(layers, where).device)
    assert float(stack.state(layers, more).host) >= float(stack.state(layers, where).host)


@pytest.mark.parametrize("spec", _SPECS)
@given(
    layers=groups(),
    prompts=st.lists(st.integers(1, 50_000), min_size=2, max_size=4),
    level=st.sampled_from(["ideal", "reference"]),
)
@settings(max_examples=15)
def test_arrays_are_their_elements(
    spec: str, layers: MixerGroup, prompts: list[int], level: str
) -> None:
    stack = parse_method(spec)
    s = np.array(prompts, dtype=np.float64)
    together = point(s, s + 130, level=level)
    state = np.broadcast_to(stack.state(layers, together).device, s.shape)
    moved = [
        np.broadcast_to(total(hook(layers, together), "moved_bytes"), s.shape)
        for hook in (stack.prefill, stack.decode)
    ]
    for i, prompt in enumerate(prompts):
        alone = point(prompt, prompt + 130, level=level)
        assert state[i] == float(stack.state(layers, alone).device)
        for j, hook in enumerate((stack.prefill, stack.decode)):
            assert moved[j][i] == pytest.approx(float(total(hook(layers, alone), "moved_bytes")))


@pytest.mark.parametrize(
    ("spec", "smaller", "larger"),
    [
        ("snapkv:keep_tokens", 512, 1024),
        ("pyramidkv:keep_tokens", 512, 1024),
        ("tova:keep_tokens", 512, 1024),
        ("streaming_llm:window_tokens", 512, 1024),
        ("streaming_llm:sink_tokens", 4, 64),
        ("h2o:heavy_fraction", 0.1, 0.3),
        ("h2o:recent_fraction", 0.1, 0.3),
        ("knorm:kept_fraction", 0.2, 0.6),
        ("kivi:bits", 2, 4),
        ("kivi:residual_tokens", 64, 256),
        ("kvquant:bits", 2, 3),
        ("kvquant:outlier_fraction", 0, 0.01),
        ("flexgen:bits", 2, 4),
        ("infllm:local_tokens", 2048, 4096),
        ("infllm:cached_blocks", 16, 64),
        ("kv_offload:resident_layers", 1, 3),
    ],
)
@given(layers=groups(), where=points(level="ideal"))
@settings(max_examples=15)
def test_parameters_point_the_way_they_say(
    spec: str, smaller: float, larger: float, layers: MixerGroup, where: Point
) -> None:
    sizes = [
        float(parse_method(f"{spec}={value}").state(layers, where).device)
        for value in (smaller, larger)
    ]
    # a budget that holds everything drops InfLLM's buffers, and the sawtooth of KIVI may cross
    if spec.startswith("infllm") and np.any(
        parse_method(f"{spec}={larger}").equals_full(where.cached_tokens)
    ):
        return
    if spec == "kivi:residual_tokens":
        where = where.at(np.maximum(np.floor(where.cached_tokens / 256), 1) * 256)
        sizes = [
            float(parse_method(f"{spec}={value}").state(layers, where).device)
            for value in (smaller, larger)
        ]
    assert sizes[0] <= sizes[1]
