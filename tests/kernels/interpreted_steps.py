"""Twins that step by kernels beside the same twins in plain torch."""

import pytest
import torch

from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from measure.flops import count_flops
from measure.kernels import interpreted
from measure.methods import build_layer_cache

DEVICE = torch.device("cpu" if interpreted() else "cuda")
SIZE, HEADS, KV_HEADS, BATCH = 64, 2, 1, 2
R = "residual_tokens=32"


def cache(spec, fused, dtype, room):
    mixer = Attention(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=SIZE, v_head_dim=SIZE)
    return build_layer_cache(
        parse_method(spec), mixer, batch=BATCH, dtype=dtype, device=DEVICE,
        reserve_tokens=room, fused=fused,
    )  # fmt: skip


def tokens(n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(BATCH, heads, n, SIZE, generator=generator).to(DEVICE, dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def at(qkv, t):
    return tuple(x[:, :, t : t + 1] for x in qkv)


def held(twin):
    return [b.entries().clone().view(torch.uint8) for b in twin._buffers() if b.length]


# From 30 tokens on a first block of keys is filled, from 62 on there are packed values too.
@pytest.mark.parametrize(
    ("spec", "dtype", "prompt"),
    [
        (f"kivi:bits=2,{R}", torch.float32, 30),
        (f"kivi:bits=2,{R}", torch.float32, 62),
        (f"kivi:bits=4,{R}", torch.float16, 62),
        ("flexgen:bits=4,group=32", torch.float32, 62),
        ("fp8_kv", torch.float32, 30),
        ("full", torch.float16, 30),
    ],
    ids=str,
)
def test_steps_equal_the_torch_form(spec, dtype, prompt):
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    steps, qkv = 3, tokens(70, dtype)
    plain, fused = (cache(spec, f, dtype, prompt + steps) for f in (False, True))
    for twin in (plain, fused):
        twin.prefill(*(x[:, :, :prompt] for x in qkv))
    for t in range(prompt, prompt + steps):
        found, expected = [], []
        flops = [
            count_flops(lambda f=f, x=x, t=t: x.append(f.decode(*at(qkv, t))))
            for f, x in ((fused, found), (plain, expected))
        ]
        assert flops[0] == flops[1] > 0
        found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        # What the kernels quantise and append is bit for bit what torch does, in every buffer.
        for a, b in zip(held(fused), held(plain), strict=True):
            assert torch.equal(a, b)
        assert fused.n_tokens == plain.n_tokens
        assert fused.held_bytes == plain.held_bytes
    assert fused.step_state.lengths.tolist() == [prompt + steps] * BATCH


@pytest.mark.parametrize("spec", [f"kivi:bits=2,{R}", "flexgen:bits=4,group=32"])
def test_a_step_is_undone_also_after_replays(spec):
    qkv = tokens(40, torch.float32)
    twin = cache(spec, True, torch.float32, 40)
    twin.prefill(*(x[:, :, :31] for x in qkv))
    first = twin.decode(*at(qkv, 31))  # fills a block of keys
    before = twin.snapshot()
    expected = twin.decode(*at(qkv, 32))
    assert not torch.equal(first, expected)
    twin.step_state.lengths.add_(3)  # as replays of a captured step do
    twin.restore(before)
    torch.testing.assert_close(twin.decode(*at(qkv, 32)), expected, rtol=0, atol=0)


def test_room_is_made_where_it_lacks():
    qkv = tokens(70, torch.float32)
    twins = [cache(f"kivi:bits=2,{R}", f, torch.float32, 30) for f in (False, True)]
    for twin in twins:
        twin.prefill(*(x[:, :, :30] for x in qkv))
    for t in range(30, 34):
        plain, fused = (twin.decode(*at(qkv, t)) for twin in twins)
        torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-5)


def test_what_no_kernel_is_built_for_runs_in_torch():
    qkv = tokens(10, torch.float32)
    # fp32; padded heads; blocks that are no power of two
    for spec in ("full", "flexgen:bits=4,group=12", "kivi:residual_tokens=96"):
        plain, fused = (cache(spec, f, torch.float32, 10) for f in (False, True))
        for twin in (plain, fused):
            twin.prefill(*(x[:, :, :5] for x in qkv))
        assert torch.equal(fused.decode(*at(qkv, 5)), plain.decode(*at(qkv, 5)))
        assert fused.step_state is None
