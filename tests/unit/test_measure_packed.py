"""Methods that pack every token: error bounds, and attention over what is packed."""

import pytest
import torch
from twin_cases import BATCH, HEADS, KV_HEADS, cache, part, probabilities, tokens

SPECS = ["fp8_kv", "flexgen:group=8", "flexgen:group=12", "flexgen:bits=8,group=16"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_attends_what_is_unpacked_and_the_new_token(spec):
    twin, qkv = cache(spec), tokens(41)
    twin.prefill(*part(qkv, 0, 30))
    for t in range(30, 41):
        k, v = (twin.unpacked(side, 0, t) for side in (twin.keys, twin.values))
        q, new_k, new_v = part(qkv, t, t + 1)
        found = twin.decode(q, new_k, new_v)
        for b in range(BATCH):
            for h in range(HEADS):
                one = h // (HEADS // KV_HEADS)
                p = probabilities(q[b, h, 0], torch.cat((k[b, one], new_k[b, one])))
                expected = p @ torch.cat((v[b, one], new_v[b, one]))
                torch.testing.assert_close(found[b, h, 0], expected)


def test_fp8_error_is_within_half_a_step():
    twin, (q, k, v) = cache("fp8_kv"), tokens(50)
    twin.prefill(q, k * 30, v)
    error = (twin.unpacked(twin.keys, 0, 50) - k * 30).abs()
    scale = (k * 30).abs().max() / 448
    # 3 mantissa bits: half a step is 1/16 of the value; below 2^-6 steps are 2^-9.
    assert bool((error <= torch.maximum((k * 30).abs() / 16, scale * 2**-10) * 1.001).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize(("bits", "group"), [(2, 4), (4, 8), (8, 16), (4, 6)])
def test_flexgen_error_is_within_half_a_scale(bits, group):
    twin, (q, k, v) = cache(f"flexgen:bits={bits},group={group}"), tokens(50)
    twin.prefill(q, k, v)
    n = -(-16 // group) * group
    padded = torch.nn.functional.pad(v, (0, n - 16)).unflatten(-1, (-1, group))
    span = padded.amax(-1) - padded.amin(-1)
    bound = (span / (2**bits - 1) / 2 + 1e-5).repeat_interleave(group, -1)[..., :16]
    error = (twin.unpacked(twin.values, 0, 50) - v).abs()
    assert bool((error <= bound).all())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("reserve", [0, 40])
def test_a_step_can_be_taken_back(spec, reserve):
    twin, qkv = cache(spec, reserve=reserve), tokens(31)
    twin.prefill(*part(qkv, 0, 30))
    mark, held = twin.snapshot(), twin.held_bytes
    first = twin.decode(*part(qkv, 30, 31))
    twin.restore(mark)
    assert (twin.n_tokens, twin.held_bytes) == (30, held)
    assert torch.equal(twin.decode(*part(qkv, 30, 31)), first)
