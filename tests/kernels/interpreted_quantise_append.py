"""Appending to packed caches, interpreted: bit for bit what the torch packing gives."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from measure.kernels import interpreted
from measure.kernels.quantise_append import (
    kivi_append,
    reference_block,
    reference_token,
    token_append,
)

assert interpreted()


def draw(*shape, dtype, generator, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def buffers(*, batch, kv, size, bits, group, r, room, dtype):
    """Empty KIVI buffers for ``room`` tokens."""
    keys = (
        torch.zeros(batch, kv, room // r, size, r * bits // 32, dtype=torch.int32),
        *(torch.zeros(batch, kv, room // r, size, r // group, dtype=dtype) for _ in "sz"),
    )
    values = (
        torch.zeros(batch, kv, room, size * bits // 32, dtype=torch.int32),
        *(torch.zeros(batch, kv, room, size // group, dtype=dtype) for _ in "sz"),
    )
    recent = tuple(torch.zeros(batch, kv, r, size, dtype=dtype) for _ in "kv")
    return keys, values, *recent


@settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    bits=st.sampled_from([2, 4]),
    r=st.sampled_from([32, 64]),
    group=st.sampled_from([16, 32]),
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_kivi_from_the_first_token_on(bits, r, group, batch, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    n, size = 2 * r + 3, 64
    made = {"dtype": dtype, "generator": generator, "scale": scale}
    k, v = draw(batch, 1, n, size, **made), draw(batch, 1, n, size, **made)
    room = 4 * r
    keys, values, rk, rv = buffers(
        batch=batch, kv=1, size=size, bits=bits, group=group, r=r, room=room, dtype=dtype
    )
    lengths, arrived = torch.zeros(batch, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for t in range(n):
        new = k[:, :, t : t + 1].contiguous(), v[:, :, t : t + 1].contiguous()
        kivi_append(
            *new, keys, values, rk, rv, lengths, arrived,
            bits=bits, group=group, residual=r, ring_start=0,
        )  # fmt: skip
        assert lengths.tolist() == [t + 1] * batch
        assert arrived.item() == 0
    for block in range(2):
        expected = reference_block(k[:, :, block * r : (block + 1) * r], bits, group)
        for found, part in zip(keys, expected, strict=True):
            assert torch.equal(found[:, :, block : block + 1], part)
    for found, part in zip(
        values, reference_token(v[:, :, : n - r], bits, group, None), strict=True
    ):
        part = part.view(found.dtype)
        assert torch.equal(found[:, :, : n - r], part)
        assert not found[:, :, n - r :].any()
    assert torch.equal(rk[:, :, :3], k[:, :, 2 * r :])
    assert torch.equal(rv.roll(-3, 2), v[:, :, n - r :])


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_in_place(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    size, group, room = 64, 32, 5
    k, v = (draw(2, 2, 3, size, dtype=dtype, generator=generator) for _ in "kv")
    scale = torch.tensor([0.01]) if bits == 8 else None
    expected = [reference_token(x, bits, group, scale) for x in (k, v)]
    caches = [
        tuple(torch.zeros(2, 2, room, *p.shape[3:], dtype=p.dtype) for p in parts)
        for parts in expected
    ]
    extra = () if scale is None else (scale,)
    lengths, arrived = torch.tensor([0, 0]), torch.zeros(1, dtype=torch.int32)
    for t in range(3):
        token_append(
            *(x[:, :, t : t + 1].contiguous() for x in (k, v)),
            *(cache + extra for cache in caches), lengths, arrived, bits=bits, group=group,
        )  # fmt: skip
    assert lengths.tolist() == [3, 3]
    for cache, parts in zip(caches, expected, strict=True):
        for found, part in zip(cache, parts, strict=True):
            assert torch.equal(found[:, :, :3].view(torch.uint8), part.view(torch.uint8))
            assert not found[:, :, 3:].float().any()


def test_e4m3_rounds_as_torch_does():
    # Every midpoint between neighbours, their neighbours, and beyond both ends.
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), numbers * 1.01))
    x = torch.nn.functional.pad(torch.cat((x, -x)), (0, -2 * len(x) % 64)).view(-1, 64)
    for row in x:
        k = row.view(1, 1, 1, 64).contiguous()
        cache = tuple(torch.zeros(1, 1, 1, 64, dtype=torch.float8_e4m3fn) for _ in "kv")
        one = torch.ones(1)
        parts = ((cache[0], one), (cache[1], one))
        counts = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        token_append(k, k, *parts, *counts, bits=8)
        (expected,) = reference_token(k, 8, 0, one)
        assert torch.equal(cache[0].view(torch.uint8), expected.view(torch.uint8))
