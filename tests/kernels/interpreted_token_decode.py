"""Attention over token-wise caches against widened attention in fp32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from measure.kernels import interpreted
from measure.kernels._splits import Partials
from measure.kernels.token_decode import EXTRA_PARTS, reference, token_decode
from measure.methods.packing import quantise_bytes

DEVICE = torch.device("cpu" if interpreted() else "cuda")


def stored(x, bits, group, room):
    """Parts of a cache of x [B, K, T, H] in a larger buffer of garbage."""
    extra = ()
    if bits == 16:
        parts = (x,)
    elif bits == 8:
        scale = (
            x.abs().amax().float().reshape(1) / 448 if x.numel() else torch.ones(1, device=DEVICE)
        )
        parts, extra = ((x.float() / scale).to(torch.float8_e4m3fn),), (scale,)
    else:
        parts = quantise_bytes(x, bits, group)
    whole = []
    for part in parts:
        raw = torch.full((*part.shape[:2], room, *part.shape[3:]), 77.0).to(part)
        raw[:, :, : part.shape[2]] = part
        whole.append(raw)
    return (*whole, *extra)


def case(n_tokens, bits, *, batch=1, heads=2, kv_heads=1, size=64, group=32, splits=2,
         dtype=torch.float32, seed=0):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) + 0.5).to(DEVICE, dtype)

    k, v = (draw(batch, kv_heads, n_tokens, size) for _ in "kv")
    q, k_new, v_new = draw(batch, heads, 1, size), *(draw(batch, kv_heads, 1, size) for _ in "kv")
    keys, values = (stored(x, bits, group, n_tokens + 5) for x in (k, v))
    tensors = (q, k_new, v_new, keys, values)
    partials = Partials.empty(batch * heads, splits + EXTRA_PARTS, size, q.device)
    lengths = torch.full((batch,), n_tokens, device=DEVICE)
    found = token_decode(*tensors, lengths, partials, bits=bits, group=group)
    return found, reference(*tensors, bits=bits, group=group, n_tokens=n_tokens)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


# A step of the loop takes 32 tokens of 16 bits, 64 of 8 or 4.
@pytest.mark.parametrize(
    ("bits", "n_tokens"),
    [(16, n) for n in (0, 1, 32, 33)] + [(8, n) for n in (0, 63, 64, 65)]
    + [(4, n) for n in (0, 1, 63, 130)],
)  # fmt: skip
def test_every_boundary(bits, n_tokens):
    close(*case(n_tokens, bits), 2e-5)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((b, torch.bfloat16) for b in (16, 8, 4, 2)), *((b, torch.float16) for b in (16, 2))],
)
def test_halves(bits, dtype):
    close(*case(100, bits, dtype=dtype, size=128, heads=4), 2e-2)


@pytest.mark.parametrize(
    ("bits", "size"), [(16, 128), (16, 256), (8, 128), (8, 256), (4, 64), (4, 128), (4, 256)]
)
def test_head_sizes(bits, size):
    close(*case(70, bits, size=size, heads=4, kv_heads=2, group=64), 2e-5)


def test_every_e4m3_number():
    """All finite bytes, as keys: the score of a unit query is the number itself."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = numbers[~numbers.float().isnan()]
    keys = torch.zeros(1, 1, len(finite), 64).to(torch.float8_e4m3fn)
    keys[0, 0, :, 5] = finite
    values = torch.zeros(1, 1, len(finite), 64)
    values[0, 0, :, 9] = 1.0
    q = torch.zeros(1, 1, 1, 64)
    q[..., 5] = 0.05
    one = torch.ones(1)
    new = torch.zeros(1, 1, 1, 64)
    parts = (keys, one), (values.to(torch.float8_e4m3fn), one)
    partials = Partials.empty(1, 2, 64, q.device)
    found = token_decode(q, new, new, *parts, torch.tensor([len(finite)]), partials, bits=8)
    close(found, reference(q, new, new, *parts, bits=8, n_tokens=len(finite)), 1e-6)


@settings(max_examples=6, deadline=None)
@given(
    n_tokens=st.integers(0, 140),
    bits=st.sampled_from([16, 8, 4]),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2), (8, 1)]),
    group=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_anything(n_tokens, bits, batch, heads, group, splits, seed):
    found, expected = case(
        n_tokens, bits, batch=batch, heads=heads[0], kv_heads=heads[1], group=group,
        splits=splits, seed=seed,
    )  # fmt: skip
    close(found, expected, 2e-4)  # as for KIVI
