"""Offloaded caches that are fetched ahead give the same steps as those fetched when needed."""

import itertools

import pytest
import torch

from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from measure.mixers import build_cache

CPU = torch.device("cpu")
N_LAYERS, PROMPT, STEPS = 4, 20, 3


def caches(ahead, device=CPU, window=None, room=PROMPT + STEPS, spec="kv_offload"):
    mixer = Attention(n_heads=4, n_kv_heads=2, head_dim=16, v_head_dim=16, window_tokens=window)
    found = [
        build_cache(parse_method(spec), mixer, batch=2, dtype=torch.float32, device=device,
                    reserve_tokens=room)
        for _ in range(N_LAYERS)
    ]  # fmt: skip
    for i, cache in enumerate(found):
        cache.place(i, N_LAYERS)
        if ahead is not None and hasattr(cache, "is_asynchronous"):
            cache.is_asynchronous = ahead
    for cache, successor in itertools.pairwise(found):
        cache.link(successor)
    return found


def steps(layers, device=CPU):
    """Outputs of some steps, each put back once and run again."""
    generator = torch.Generator().manual_seed(0)

    def drawn(heads, n):
        return torch.randn(2, heads, n, 16, generator=generator).to(device)

    for cache in layers:
        cache.prefill(drawn(4, PROMPT), drawn(2, PROMPT), drawn(2, PROMPT))
    found = []
    for _ in range(STEPS):
        inputs = [(drawn(4, 1), drawn(2, 1), drawn(2, 1)) for _ in layers]
        marks = [cache.snapshot() for cache in layers]
        for cache, qkv in zip(layers, inputs, strict=True):
            cache.decode(*qkv)
        for cache, mark in zip(layers, marks, strict=True):
            cache.restore(mark)
        found += [c.decode(*qkv).cpu() for c, qkv in zip(layers, inputs, strict=True)]
    return found


@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize("room", [PROMPT + STEPS, PROMPT])
def test_fetching_ahead_changes_nothing(window, room):
    """With room for the new tokens, and without, where it cannot be done."""
    ahead, needed = caches(True, window=window, room=room), caches(False, window=window, room=room)
    for mine, expected in zip(steps(ahead), steps(needed), strict=True):
        assert torch.equal(mine, expected)
    assert [c.host_bytes for c in ahead] == [c.host_bytes for c in needed]
    assert [c.held_bytes for c in ahead] == [c.held_bytes for c in needed]


def test_every_layers_copy_begins_with_the_step_before_it(monkeypatch):
    layers = caches(True)
    order = []
    for i, cache in enumerate(layers):
        real = type(cache).prefetch

        def prefetch(cache=cache, i=i, real=real):
            if cache._incoming is None:
                order.append(i)
            real(cache)

        monkeypatch.setattr(cache, "prefetch", prefetch, raising=False)
    steps(layers)
    one_step = [0, 1, 2, 3]
    assert order == one_step * (len(order) // 4)


@pytest.mark.gpu
def test_a_gpu_fetches_the_same_from_pinned_memory():
    gpu = torch.device("cuda:0")
    layers = caches(None, device=gpu)
    assert all(h.whole.is_pinned() for c in layers[2:] for h in c.host)
    for mine, expected in zip(steps(layers, gpu), steps(caches(False)), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
