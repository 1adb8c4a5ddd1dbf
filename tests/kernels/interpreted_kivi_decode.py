"""Attention over KIVI caches against unpacked attention in fp32."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from measure.kernels import interpreted
from measure.kernels._splits import Partials
from measure.kernels.kivi_decode import EXTRA_PARTS, kivi_decode, reference
from measure.methods.packing import quantise

DEVICE = torch.device("cpu" if interpreted() else "cuda")


def packed(x, bits, group, room):
    """Quantise [..., n], and put entries of axis 2 into a larger buffer of garbage."""
    parts = []
    for part in quantise(x, bits, group):
        buffer = part.new_full((*part.shape[:2], room, *part.shape[3:]), 77)
        buffer[:, :, : part.shape[2]] = part
        parts.append(buffer)
    return tuple(parts)


def case(n_tokens, *, batch=1, heads=2, kv_heads=1, size=64, bits=2, group=32, r=32,
         dtype=torch.float32, splits=2, ring_start=0, seed=0, lengths=None):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    k, v = (draw(batch, kv_heads, n_tokens, size) * 2 + 1 for _ in "kv")
    q, k_new, v_new = draw(batch, heads, 1, size), *(draw(batch, kv_heads, 1, size) for _ in "kv")
    n_blocks, n_values = n_tokens // r, max(0, n_tokens - r)
    blocks = k[:, :, : n_blocks * r].unflatten(2, (n_blocks, r)).transpose(-1, -2)
    keys = packed(blocks.contiguous(), bits, group, n_blocks + 1)
    values = packed(v[:, :, :n_values], bits, group, n_values + 3)
    room = min(r, n_tokens + 1)
    recent_keys, recent_values = (draw(batch, kv_heads, room, size) for _ in "kv")
    recent_keys[:, :, : n_tokens - n_blocks * r] = k[:, :, n_blocks * r :]
    for t in range(n_values, n_tokens):
        recent_values[:, :, (t - ring_start) % r] = v[:, :, t]
    common = dict(bits=bits, group=group, ring_start=ring_start)
    tensors = (q, k_new, v_new, keys, values, recent_keys, recent_values)
    lengths = torch.tensor([n_tokens] * batch if lengths is None else lengths, device=DEVICE)
    partials = Partials.empty(batch * heads, splits + EXTRA_PARTS, size, q.device)
    found = kivi_decode(*tensors, lengths, partials, residual=r, **common)
    one = [tree_map(lambda x, i=i: x[i : i + 1], tensors) for i in range(batch)]
    expected = [
        reference(*x, n_tokens=n, **common) for x, n in zip(one, lengths.tolist(), strict=True)
    ]
    return found, torch.cat(expected)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n_tokens", [0, 1, 31, 32, 33, 63, 64, 65, 97])
def test_every_boundary(n_tokens):
    close(*case(n_tokens), 2e-5)


@pytest.mark.parametrize("n_tokens", [127, 128, 191, 193, 300])
def test_two_tiles_a_block(n_tokens):
    """Four bits fill the words of 64 tokens: a block of 128 is attended in two tiles."""
    close(*case(n_tokens, bits=4, r=128, heads=1), 2e-5)


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.bfloat16), (4, torch.float16)])
def test_halves(bits, dtype):
    # Products are rounded to halves once each; the output is rounded to the type.
    close(*case(130, bits=bits, dtype=dtype, heads=4), 2e-2)


@pytest.mark.parametrize(("bits", "size"), [(2, 64), (2, 128), (4, 128), (2, 256), (4, 256)])
def test_head_sizes_and_whole_residual(bits, size):
    close(*case(300, bits=bits, size=size, r=128, heads=3, ring_start=44), 2e-5)


@settings(max_examples=6, deadline=None)
@given(
    n_tokens=st.integers(0, 150),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 1)]),
    group=st.sampled_from([16, 32]),
    r=st.sampled_from([32, 64]),
    bits=st.sampled_from([2, 4]),
    splits=st.integers(1, 5),
    ring_start=st.integers(0, 31),
    seed=st.integers(0, 2**31),
)
@example(150, 1, (8, 1), 16, 64, 2, 1, 31, 0)
def test_anything(n_tokens, batch, heads, group, r, bits, splits, ring_start, seed):
    found, expected = case(
        n_tokens, batch=batch, heads=heads[0], kv_heads=heads[1], group=group, r=r, bits=bits,
        splits=splits, ring_start=ring_start if n_tokens >= r else 0, seed=seed,
    )  # fmt: skip
    # What the 1 of a fraction adds is taken off again: fp32 rounds sums up to 2^6 times as large.
    close(found, expected, 2e-4)


def test_sequences_of_different_lengths():
    # The lengths are read on the device: buffers of one size, a sequence that ends in their midst.
    close(*case(96, batch=2, lengths=[96, 40]), 2e-5)
