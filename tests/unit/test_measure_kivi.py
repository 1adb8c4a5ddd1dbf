"""KIVI's packing, error bound and attention, against slow and obvious code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import NotApplicableError
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from measure.methods import build_layer_cache, layer_cache_class
from measure.methods.packing import dequantise, quantise
from measure.runnable import runnable_names

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

CPU = torch.device("cpu")


def cache(spec: str, *, heads=4, kv_heads=2, size=32, batch=1, dtype=torch.float32, reserve=0):
    mixer = Attention(n_heads=heads, n_kv_heads=kv_heads, head_dim=size, v_head_dim=size)
    return build_layer_cache(
        parse_method(spec), mixer, batch=batch, dtype=dtype, device=CPU, reserve_tokens=reserve
    )


def test_codes_of_a_word_by_hand():
    # 0 1 2 3 four times over, at 2 bits from the lowest: bytes 0b11_10_01_00 = 0xE4.
    words, scale, zero = quantise(torch.tensor([0.0, 1.0, 2.0, 3.0] * 4), 2, 16)
    assert words.tolist() == [0xE4E4E4E4 - 2**32]
    assert (scale.item(), zero.item()) == (1.0, 0.0)
    # 4 bits: 0..7 in one word, nibbles from the lowest: 0x76543210; 15 makes the scale 1.
    words, scale, _ = quantise(torch.arange(16.0), 4, 16)
    assert words.tolist() == [0x76543210, 0xFEDCBA98 - 2**32]
    assert scale.item() == 1.0


def test_the_data_quantised_is_left_alone():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64).to(dtype)
        before = x.clone()
        quantise(x, 2, 32)
        assert torch.equal(x, before)


def test_a_constant_group_is_exact():
    x = torch.full((3, 32), 0.7)
    parts = quantise(x, 2, 32)
    assert torch.equal(dequantise(*parts, 2, 32), x)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 4]),
    group=st.sampled_from([8, 16, 32]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_within_half_a_scale(seed, bits, group, scale, offset, dtype):
    torch.manual_seed(seed)
    x = ((torch.randn(4, 64) + offset) * scale).to(dtype)
    words, steps, zero = quantise(x, bits, group)
    found = dequantise(words, steps, zero, bits, group)
    error = (found.float() - x.float()).abs().unflatten(-1, (-1, group))
    # Scale, zero, product and sum are each rounded to the type once: 4 units of the largest value.
    rounding = 4 * torch.finfo(dtype).eps * x.float().abs().max()
    assert bool((error <= steps.float().unsqueeze(-1) / 2 + rounding).all())


def test_everything_in_the_residual_is_full_attention_exactly():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        full = cache("full", batch=2, dtype=dtype)
        kivi = cache("kivi:residual_tokens=64", batch=2, dtype=dtype)
        shape = (2, 2, 20, 32)
        prompt = [
            torch.randn(2, 4, 20, 32).to(dtype),
            *(torch.randn(shape).to(dtype) for _ in "kv"),
        ]
        assert torch.equal(full.prefill(*prompt), kivi.prefill(*prompt))
        for _ in range(43):  # up to 63 cached tokens and the new one: nothing is quantised yet
            q = torch.randn(2, 4, 1, 32).to(dtype)
            k, v = (torch.randn(2, 2, 1, 32).to(dtype) for _ in "kv")
            assert torch.equal(full.decode(q, k, v), kivi.decode(q, k, v))


def fake_quantised(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Quantise and restore along the last axis, one group at a time."""
    out = np.empty_like(x)
    for row, restored in zip(x.reshape(-1, group), out.reshape(-1, group), strict=True):
        low, high = row.min(), row.max()
        scale = np.float32((high - low) / np.float32(2**bits - 1)) or np.float32(1)
        restored[:] = np.clip(np.rint((row - low) / scale), 0, 2**bits - 1) * scale + low
    return out


def slow_kivi(q, k, v, n_prompt, bits, group, residual):
    """Attention of the last token with the history as KIVI keeps it; one head, numpy."""
    t = len(k) - 1  # cached before this token
    n_keys, n_values = t - t % residual, max(0, t - residual)
    k, v = k.copy(), v.copy()
    k[:n_keys] = fake_quantised(np.ascontiguousarray(k[:n_keys].T), bits, group).T
    v[:n_values] = fake_quantised(v[:n_values], bits, group)
    scores = k @ q / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n_prompt", [15, 16, 17, 40, 48])
@pytest.mark.parametrize("reserve", [0, 100])
def test_decode_equals_the_slow_form(bits, n_prompt, reserve):
    torch.manual_seed(n_prompt)
    batch, heads, kv_heads, size, steps = 2, 4, 2, 16, 36
    kivi = cache(
        f"kivi:bits={bits},group=8,residual_tokens=16",
        heads=heads, kv_heads=kv_heads, size=size, batch=batch, reserve=reserve,
    )  # fmt: skip
    total = n_prompt + steps
    q = torch.randn(batch, heads, total, size)
    k, v = (torch.randn(batch, kv_heads, total, size) for _ in "kv")
    kivi.prefill(*(x[:, :, :n_prompt] for x in (q, k, v)))
    for t in range(n_prompt, total):
        found = kivi.decode(*(x[:, :, t : t + 1] for x in (q, k, v)))
        for b, h in ((0, 0), (1, 3)):
            one = h // (heads // kv_heads)
            expected = slow_kivi(
                q[b, h, t].numpy(), k[b, one, : t + 1].numpy(), v[b, one, : t + 1].numpy(),
                n_prompt, bits, 8, 16,
            )  # fmt: skip
            np.testing.assert_allclose(found[b, h, 0].numpy(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["full", "kivi:group=8,residual_tokens=16"])
@pytest.mark.parametrize("n_tokens", [9, 15, 16, 31, 33])
@pytest.mark.parametrize("reserve", [0, 64])
def test_a_step_can_be_taken_back(spec, n_tokens, reserve):
    torch.manual_seed(0)
    kept = cache(spec, size=16, reserve=reserve)
    kept.fill(n_tokens, seed=3)
    step = [torch.randn(1, 4, 1, 16), *(torch.randn(1, 2, 1, 16) for _ in "kv")]
    mark, held = kept.snapshot(), kept.held_bytes
    first = kept.decode(*step)
    kept.restore(mark)
    assert (kept.n_tokens, kept.held_bytes) == (n_tokens, held)
    assert torch.equal(kept.decode(*step), first)


def test_heads_that_do_not_pack_are_refused():
    with pytest.raises(NotApplicableError, match="head_dim"):
        cache("kivi", size=24)


def test_twins_are_found_by_name():
    assert {"full", "kivi"} <= set(runnable_names())
    assert layer_cache_class("kivi").NAME == "kivi"
    with pytest.raises(NotApplicableError, match=r"runnable: .*full.*kivi"):
        layer_cache_class("gear")
