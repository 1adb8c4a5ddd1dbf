"""The bridge at whatever shapes hypothesis finds: held bytes equal the prediction at every step."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.methods import method_class
from costmodel.methods.kivi import Kivi
from costmodel.methods.stack import MethodStack
from costmodel.mixers import Attention
from costmodel.workload import Point
from measure.engine import TORCH_DTYPES
from measure.flops import count_flops
from measure.methods import build_layer_cache
from measure.numerics import Rope
from measure.parts import rope_table, rotate

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@st.composite
def kivi_points(draw):
    bits = draw(st.sampled_from([2, 4]))
    group = draw(st.sampled_from([4, 8, 16, 32]))
    unit = max(group, 32 // bits)
    return {
        "method": Kivi(bits=bits, group=group, residual_tokens=unit * draw(st.integers(1, 3))),
        "size": unit * draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 3)),
        "ratio": draw(st.integers(1, 4)),
        "batch": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        "prompt": draw(st.integers(1, 200)),
        "steps": draw(st.integers(0, 12)),
        "reserve": draw(st.booleans()),
    }


@settings(deadline=None, max_examples=80)
@given(kivi_points())
def test_kivi_holds_what_is_predicted(case):
    size, kv_heads, batch = case["size"], case["kv_heads"], case["batch"]
    n_heads = kv_heads * case["ratio"]
    mixer = Attention(n_heads=n_heads, n_kv_heads=kv_heads, head_dim=size, v_head_dim=size)
    dtype = TORCH_DTYPES[case["dtype"]]
    stack = MethodStack((case["method"],))
    cache = build_layer_cache(
        stack,
        mixer,
        batch=batch,
        dtype=dtype,
        device=torch.device("cpu"),
        reserve_tokens=case["prompt"] + case["steps"] if case["reserve"] else 0,
    )
    cache.fill(case["prompt"])
    room = cache.storage_bytes
    group = MixerGroup(mixer, 1, (0,), 1)
    for cached in range(case["prompt"], case["prompt"] + case["steps"] + 1):
        at = Point(
            batch=float(batch),
            prompt_tokens=float(case["prompt"]),
            cached_tokens=float(cached),
            reserved_tokens=float(cached),
            dtype=case["dtype"],
            kv_dtype=case["dtype"],
            level="ideal",
            engine=load_engine("torch"),
        )
        assert cache.held_bytes == float(stack.state(group, at).device)
        assert cache.storage_bytes == (room if case["reserve"] else cache.held_bytes)
        if cached < case["prompt"] + case["steps"]:
            q = torch.ones(batch, n_heads, 1, size, dtype=dtype)
            out = cache.decode(q, q[:, :kv_heads], q[:, :kv_heads])
            assert out.shape == q.shape
            assert bool(torch.isfinite(out).all())


@st.composite
def methods(draw):
    """Any runnable method with any parameters that bound a small cache."""

    def whole(low, high):
        return draw(st.integers(low, high))

    def share():
        return draw(st.floats(0.0, 1.0))

    name = draw(st.sampled_from(
        ["full", "fp8_kv", "flexgen", "kvquant", "h2o", "streaming_llm", "infllm", "snapkv",
         "pyramidkv", "tova", "quest", "minference", "kv_offload"]
    ))  # fmt: skip
    window = whole(1, 8)
    bits = draw(st.sampled_from([2, 4, 8]))
    parameters = {
        "flexgen": lambda: {"bits": bits, "group": 8 // bits * whole(1, 20)},
        "kvquant": lambda: {"bits": whole(2, 4), "outlier_fraction": share()},
        "h2o": lambda: {
            "variant": draw(st.sampled_from(["slot", "real_drop", "mask"])),
            "heavy_fraction": share(),
            "recent_fraction": share(),
        },
        "streaming_llm": lambda: {
            "sink_tokens": whole(0, 9),
            "window_tokens": whole(1, 40),
            "positions": draw(st.sampled_from(["cache", "fixed"])),
        },
        "infllm": lambda: {
            "block_tokens": whole(1, 8),
            "init_tokens": whole(0, 9),
            "local_tokens": whole(1, 30),
            "topk": 2,
            "cached_blocks": whole(2, 5),
            "chunk_tokens": whole(1, 40),
            "repr_topk": whole(1, 9),
        },
        "snapkv": lambda: {"window_tokens": window, "keep_tokens": window + whole(1, 40)},
        "pyramidkv": lambda: {"window_tokens": window, "keep_tokens": window + whole(1, 40)},
        "tova": lambda: {"keep_tokens": whole(1, 60)},
        "quest": lambda: {"page_tokens": window, "keep_tokens": window + whole(0, 40)},
        "minference": lambda: {"kept_tokens": whole(1, 70)},
        "kv_offload": lambda: {"resident_layers": whole(1, 4)},
    }
    return method_class(name)(**parameters.get(name, dict)())


@settings(deadline=None, max_examples=200)
@given(
    method=methods(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 6, 16])),
    window=st.sampled_from([None, None, 7, 20]),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(["fp32", "bf16"]),
    prompt=st.integers(1, 90),
    steps=st.integers(0, 7),
    reserve=st.booleans(),
    layer=st.integers(0, 3),
    form=st.sampled_from([("best", "ideal"), ("reference", "reference")]),
)
def test_every_method_holds_what_is_predicted(
    method, sizes, window, batch, dtype, prompt, steps, reserve, layer, form
):
    kv_heads, ratio, size = sizes
    mixer = Attention(
        n_heads=kv_heads * ratio,
        n_kv_heads=kv_heads,
        head_dim=size,
        v_head_dim=size,
        window_tokens=window,
    )
    stack = MethodStack((method,))
    cache = build_layer_cache(
        stack,
        mixer,
        batch=batch,
        dtype=TORCH_DTYPES[dtype],
        device=torch.device("cpu"),
        realisation=form[0],
    )
    cache.place(layer, 4)
    if reserve:
        cache.reserve(prompt + steps)
    q, k, v = (
        torch.randn(batch, n, prompt + steps, size).to(TORCH_DTYPES[dtype])
        for n in (kv_heads * ratio, kv_heads, kv_heads)
    )
    out = cache.prefill(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    assert bool(torch.isfinite(out).all())
    group = MixerGroup(mixer, 1, (layer,), 4)
    for cached in range(prompt, prompt + steps + 1):
        at = Point(
            batch=float(batch),
            prompt_tokens=float(prompt),
            cached_tokens=float(cached),
            reserved_tokens=float(cached),
            dtype=dtype,
            kv_dtype=dtype,
            level=form[1],
            engine=load_engine("torch"),
        )
        state = stack.state(group, at)
        assert (cache.held_bytes, cache.host_bytes) == (float(state.device), float(state.host))
        if not reserve:
            assert cache.storage_bytes == cache.held_bytes
        if cached < prompt + steps:
            step = (x[:, :, cached : cached + 1] for x in (q, k, v))
            assert bool(torch.isfinite(cache.decode(*step)).all())
    assert cache.n_tokens == prompt + steps


@settings(deadline=None, max_examples=50)
@given(
    method=methods(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 6, 16])),
    window=st.sampled_from([None, None, 7, 20]),
    batch=st.integers(1, 3),
    prompt=st.integers(1, 90),
    steps=st.integers(0, 7),
    layer=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_both_forms_multiply_what_is_predicted_and_agree(
    method, sizes, window, batch, prompt, steps, layer, seed
):
    kv_heads, ratio, size = sizes
    heads = (kv_heads * ratio, kv_heads, kv_heads)
    mixer = Attention(
        n_heads=heads[0],
        n_kv_heads=kv_heads,
        head_dim=size,
        v_head_dim=size,
        window_tokens=window,
    )
    stack, group, rope = MethodStack((method,)), MixerGroup(mixer, 1, (layer,), 4), Rope()
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.randn(batch, n, prompt + steps, size, generator=generator) for n in heads]
    table = rope_table(prompt + steps, size, rope, torch.float32, torch.device("cpu"))
    turned = [rotate(plain[0], table), rotate(plain[1], table), plain[2]]
    outs = []
    for form, level in (("best", "ideal"), ("reference", "reference")):
        cache = build_layer_cache(
            stack,
            mixer,
            batch=batch,
            dtype=torch.float32,
            device=torch.device("cpu"),
            realisation=form,
        )
        cache.place(layer, 4, rope)
        qkv, found = plain if cache.ROTATES else turned, []
        for start in (0, *range(prompt, prompt + steps)):
            stop = max(prompt, start + 1)
            at = Point(
                batch=float(batch),
                prompt_tokens=float(prompt),
                cached_tokens=float(max(prompt, start)),
                reserved_tokens=float(prompt + steps),
                dtype="fp32",
                kv_dtype="fp32",
                level=level,
                engine=load_engine("torch"),
            )
            call, hook = (cache.decode, stack.decode) if start else (cache.prefill, stack.prefill)
            part = [x[:, :, start:stop] for x in qkv]
            counted = count_flops(
                lambda c=call, p=part, f=found: f.append(c(*p)), square=form == "reference"
            )
            predicted = sum(np.asarray(op.count * op.counted_flops) for op in hook(group, at))
            assert counted == float(predicted)
        outs.append(torch.cat(found, dim=2))
    torch.testing.assert_close(outs[0], outs[1], atol=2e-4, rtol=2e-3)
