"""The bridge at whatever shapes hypothesis finds: held bytes equal the prediction at every step."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.architecture import MixerGroup
from costmodel.engines import load_engine
from costmodel.methods.kivi import Kivi
from costmodel.methods.stack import MethodStack
from costmodel.mixers import Attention
from costmodel.workload import Point
from measure.engine import TORCH_DTYPES
from measure.methods import build_layer_cache

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
