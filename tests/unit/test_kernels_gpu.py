"""Kernels on a CUDA device: the same twins with and without them, at sizes that matter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from measure.methods import build_layer_cache

ROOT = Path(__file__).resolve().parents[2]
SPECS = ["full", "fp8_kv", "flexgen", "kivi:bits=2", "kivi:bits=4"]


def test_benchmark_says_that_it_needs_a_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels_gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "CUDA device" in done.stderr


def twins(spec, size, heads, kv_heads, batch, context, room):
    mixer = Attention(n_heads=heads, n_kv_heads=kv_heads, head_dim=size, v_head_dim=size)
    caches = [
        build_layer_cache(
            parse_method(spec), mixer, batch=batch, dtype=torch.bfloat16,
            device=torch.device("cuda"), reserve_tokens=context + room, fused=fused,
        )
        for fused in (True, False)
    ]  # fmt: skip
    for cache in caches:
        cache.fill(context, 1)
    return caches


def draw(batch, heads, size, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(
        batch, heads, 1, size, dtype=torch.bfloat16, device="cuda", generator=generator
    )


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "batch", "context"),
    [(128, 32, 8, 2, 8192), (128, 32, 8, 1, 131), (64, 16, 2, 3, 1000), (256, 8, 4, 1, 4095)],
)
def test_steps_equal_the_torch_form(spec, size, heads, kv_heads, batch, context):
    fused, plain = twins(spec, size, heads, kv_heads, batch, context, 4)
    for seed in range(4):
        new = [draw(batch, n, size, seed + n) for n in (heads, kv_heads, kv_heads)]
        found, expected = fused.decode(*new), plain.decode(*new)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * scale)
    assert fused.step_state is not None
    assert fused.held_bytes == plain.held_bytes


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("spec", SPECS)
def test_a_captured_step_advances(spec):
    """One graph, replayed for several tokens, gives what as many eager steps give."""
    context, batch = 4096 + 126, 2
    captured, eager = twins(spec, 128, 32, 8, batch, context, 16)[0], None
    eager = twins(spec, 128, 32, 8, batch, context, 16)[0]
    inputs = [
        torch.empty(batch, n, 1, 128, dtype=torch.bfloat16, device="cuda") for n in (32, 8, 8)
    ]
    for x in inputs:
        x.zero_()
    before = captured.snapshot()
    captured.decode(*inputs)  # compiles, and makes the state
    captured.restore(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.decode(*inputs)
    captured.restore(before)
    for seed in range(4):
        new = [draw(batch, n, 128, seed + n) for n in (32, 8, 8)]
        for x, value in zip(inputs, new, strict=True):
            x.copy_(value)
        graph.replay()
        torch.testing.assert_close(out, eager.decode(*new), rtol=0, atol=0)
    assert captured.step_state.lengths.tolist() == [context + 4] * batch


@pytest.mark.gpu
@pytest.mark.triton
def test_offsets_beyond_32_bits():
    """Three sequences of a million tokens, 8 heads of 128: 3.2e9 elements a side."""
    batch, context = 3, 2**20
    mixer = Attention(n_heads=32, n_kv_heads=8, head_dim=128, v_head_dim=128)
    fused = build_layer_cache(
        parse_method("full"), mixer, batch=batch, dtype=torch.bfloat16,
        device=torch.device("cuda"), reserve_tokens=context + 4, fused=True,
    )  # fmt: skip
    fused.fill(context, 3)
    q, k, v = (draw(batch, n, 128, n) for n in (32, 8, 8))
    found = fused.decode(q, k, v)
    for x, buffer in ((k, fused.keys), (v, fused.values)):
        assert torch.equal(buffer.entries(context), x)
    # the last sequence begins behind 2^31 elements
    keys, values = (x.entries()[-1:] for x in (fused.keys, fused.values))
    expected = scaled_dot_product_attention(q[-1:], keys, values, enable_gqa=True)
    torch.testing.assert_close(found[-1:], expected, rtol=0.05, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.triton
def test_scans_of_long_prompts_equal_their_recurrences():
    """So long that RG-LRU's prompt is scanned in segments, and Mamba-2's in several chunks."""
    from measure.kernels.rglru_scan import rglru_scan, rglru_scan_reference
    from measure.kernels.ssd_scan import ssd_scan, ssd_scan_reference

    def new(*shape, dtype=torch.float32):
        return torch.randn(*shape, dtype=dtype, device="cuda")

    torch.manual_seed(5)
    tokens, width = 3000, 256
    inputs = [new(2, tokens, width, dtype=torch.bfloat16) for _ in range(3)]
    decay, before = new(width), new(2, width)
    expected_state = before.clone()
    expected = rglru_scan_reference(*inputs, decay, expected_state, first=True)
    for segments in (None, 1, 7):
        state = before.clone()
        out = rglru_scan(*inputs, decay, state, first=True, segments=segments)
        torch.testing.assert_close(out, expected, rtol=1.6e-2, atol=1.6e-2)
        torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4)

    x, step = new(2, tokens, 8, 64), torch.rand(2, tokens, 8, device="cuda")
    b, c = (new(2, tokens, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    before = new(2, 8, 64, 128)
    expected_state, state = before.clone(), before.clone()
    expected = ssd_scan_reference(x, b, c, -step, expected_state)
    out = ssd_scan(x, b, c, -step, state, 256)
    # products of tf32: 2^-10 of sums of some hundred terms
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    scale = float(expected_state.abs().max())
    torch.testing.assert_close(state, expected_state, rtol=0.01, atol=0.005 * scale)
