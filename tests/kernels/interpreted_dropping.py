"""Twins and mixers with the kernels switched on do what they do without."""

import pytest
import torch

from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from measure.kernels import interpreted, rglru_scan
from measure.methods import build_layer_cache
from measure.mixers import build_cache, runner_of
from measure.numerics import Numerics, Rope

SPECS = (
    "h2o:heavy_fraction=0.2,recent_fraction=0.2",
    "tova:keep_tokens=40",
    "snapkv:keep_tokens=48,window_tokens=16",
    "pyramidkv:keep_tokens=48,window_tokens=16",
    "streaming_llm:sink_tokens=4,window_tokens=36",
    "quest:page_tokens=16,keep_tokens=64",
)
SIZE, N_KV, GROUP = 64, 2, 4


@pytest.mark.parametrize(("spec", "reserve"), [*((s, 140) for s in SPECS), (SPECS[-1], 0)])
def test_twins(device, spec, reserve):
    mixer = Attention(n_heads=N_KV * GROUP, n_kv_heads=N_KV, head_dim=SIZE, v_head_dim=SIZE)
    generator = torch.Generator().manual_seed(7)

    def new(heads, tokens=1):
        return torch.randn(1, heads, tokens, SIZE, generator=generator).to(device)

    plain, fused = (
        build_layer_cache(
            parse_method(spec), mixer, batch=1, dtype=torch.float32, device=device,
            reserve_tokens=reserve, fused=on,
        )
        for on in (False, True)
    )  # fmt: skip
    for cache in (plain, fused):
        cache.place(2, 4, Rope())
    prompt = new(N_KV * GROUP, 120), new(N_KV, 120), new(N_KV, 120)
    torch.testing.assert_close(fused.prefill(*prompt), plain.prefill(*prompt))
    if hasattr(plain, "inner"):  # steps of the cache behind the choice are its own
        for mine, other in zip(fused._buffers(), plain._buffers(), strict=True):
            assert torch.equal(mine.entries(), other.entries())
        return
    step = new(N_KV * GROUP), new(N_KV), new(N_KV)
    kept = fused.snapshot()
    once = fused.decode(*step)
    fused.step_room.n_tokens.fill_(10_000)  # as replays of a captured step do
    fused.restore(kept)
    assert torch.equal(fused.decode(*step), once)
    torch.testing.assert_close(once, plain.decode(*step), rtol=2e-5, atol=2e-5)
    for _ in range(2):
        step = new(N_KV * GROUP), new(N_KV), new(N_KV)
        torch.testing.assert_close(fused.decode(*step), plain.decode(*step), rtol=2e-5, atol=2e-5)
    assert fused.n_tokens == plain.n_tokens
    assert fused.held_bytes == plain.held_bytes
    for mine, other in zip(fused._buffers(), plain._buffers(), strict=True):
        torch.testing.assert_close(mine.entries(), other.entries(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in SPECS if "kv:" not in s])
def test_a_step_in_16_bits(device, spec):
    """Of a cache filled without queries: no rounding decides what is kept."""
    size = 128
    mixer = Attention(n_heads=N_KV * GROUP, n_kv_heads=N_KV, head_dim=size, v_head_dim=size)
    generator = torch.Generator().manual_seed(11)

    def new(heads, tokens=1):
        x = torch.randn(2, heads, tokens, size, generator=generator)
        return x.to(device, torch.bfloat16)

    prompt, step = (new(N_KV, 300), new(N_KV, 300)), (new(N_KV * GROUP), new(N_KV), new(N_KV))
    outputs = []
    for on in (True, False):
        cache = build_layer_cache(
            parse_method(spec), mixer, batch=2, dtype=torch.bfloat16, device=device,
            reserve_tokens=310, fused=on,
        )  # fmt: skip
        cache.place(2, 4, Rope())
        cache.store(*prompt)
        outputs.append(cache.decode(*step))
    # pages may be chosen otherwise where bounds are rounded to 16 bits
    apart = (outputs[0].float() - outputs[1].float()).abs()
    assert apart.max() < (0.5 if spec.startswith("quest") else 0.02)
    assert apart.median() < 0.005


@pytest.mark.parametrize(
    "mixer",
    [
        Mamba2(n_heads=4, head_dim=16, d_state=16, n_groups=2, conv_kernel=4, chunk_tokens=16),
        RGLRU(width=16, n_blocks=2, conv_kernel=4),
    ],
    ids=lambda m: m.KIND,
)
def test_prompts_of_mixers(device, mixer, monkeypatch):
    if interpreted():  # composes element by element
        monkeypatch.setattr(rglru_scan, "_CHANNELS", 16)
    runner = runner_of(mixer, Numerics())
    torch.manual_seed(3)
    weights = {n: 0.3 * torch.randn(s.sizes, device=device) for n, s in runner.shapes(32).items()}
    stack = parse_method("full")
    plain, fused = (
        build_cache(stack, mixer, batch=2, dtype=torch.float32, device=device, fused=on)
        for on in (False, True)
    )
    x = torch.randn(2, 37, 32, device=device)
    outputs = [runner.run(x, weights, cache, None, True) for cache in (fused, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fused.state, plain.state, rtol=1e-3, atol=1e-3)
    assert fused.n_tokens == plain.n_tokens == 37
    one = x[:, :1]
    steps = [runner.run(one, weights, cache, None, False) for cache in (fused, plain)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-3)
