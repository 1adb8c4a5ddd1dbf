"""Ring-buffer decode in both position schemes, keys turned before or at read, against the twin."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.errors import NotApplicableError
from costmodel.methods.streaming_llm import StreamingLLM
from costmodel.mixers import Attention
from measure.kernels._splits import Partials
from measure.kernels.ring_decode import RingRope, ring_decode, ring_decode_reference
from measure.methods.streaming_llm import StreamingCache
from measure.numerics import Rope
from measure.parts import rope_table, rotate

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROPES = (
    Rope(),
    Rope(fraction=0.5),
    Rope(interleaved=True),
    Rope(kind="llama3", factor=8.0),
    Rope(kind="yarn", factor=4.0),
    None,
)


class Sequence:
    """Projected and turned queries and keys of one text, and the ring after ``n`` of its tokens."""

    def __init__(self, device, dtype, seed, *, batch, n_kv, group, size, length, rope):
        generator = torch.Generator().manual_seed(seed)

        def new(heads):
            return torch.randn(batch, heads, length, size, generator=generator).to(device, dtype)

        self.q, self.k, self.v = new(n_kv * group), new(n_kv), new(n_kv)
        self.turned_q, self.turned_k = self.q, self.k
        if rope is not None:
            table = rope_table(length, size, rope, dtype, device)
            self.turned_q, self.turned_k = (
                rotate(x, table, interleaved=rope.interleaved) for x in (self.q, self.k)
            )

    def ring(self, x, n, sinks, window):
        first, held = min(n, sinks), min(n, sinks + window)
        slots = torch.zeros(*x.shape[:2], sinks + window, x.shape[-1]).to(x)
        slots[:, :, :first] = x[:, :, :first]
        slots[:, :, first:held] = x[:, :, n - (held - first) : n]
        return slots


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n_kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 4, 8]),
    size=st.sampled_from([64, 128, 256]),
    sinks=st.sampled_from([0, 1, 4]),
    window=st.sampled_from([3, 31, 32, 33, 70]),
    prompt=st.sampled_from([1, 34, 72, 90]),
    rope=st.sampled_from(ROPES),
    dtype=st.sampled_from(list(TOLERANCE)),
    splits=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_steps_are_the_twins(
    device, n_kv, group, size, sinks, window, prompt, rope, dtype, splits, seed
):
    # past the moment the ring is full, and with a short one past its wrap
    steps, batch = 2, 3 - n_kv
    text = Sequence(device, dtype, seed, batch=batch, n_kv=n_kv, group=group, size=size,
                    length=prompt + steps, rope=rope)  # fmt: skip
    mixer = Attention(n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=size, v_head_dim=size)
    method = StreamingLLM(sink_tokens=sinks, window_tokens=window)
    cache = StreamingCache(method, mixer, batch=batch, dtype=dtype, device=device)
    cache.place(0, 1, rope)
    cache.prefill(*(x[:, :, :prompt] for x in (text.turned_q, text.turned_k, text.v)))
    projected, turned = (
        {"keys": text.ring(x, prompt, sinks, window),
         "values": text.ring(text.v, prompt, sinks, window)}
        for x in (text.k, text.turned_k)
    )  # fmt: skip
    partials = Partials.empty(batch * n_kv * group, splits, size, device)
    common = dict(sinks=sinks, window=window, ring_start=max(prompt, sinks + window),
                  rope=RingRope.make(rope, size, device), partials=partials)  # fmt: skip
    for t in range(prompt, prompt + steps):
        now = slice(t, t + 1)
        common["n_tokens"] = torch.tensor([t], device=device)
        v = text.v[:, :, now]
        at_read = ring_decode(
            text.q[:, :, now], text.k[:, :, now], v, **projected, turn_keys=True, **common
        )
        before = ring_decode(
            text.turned_q[:, :, now], text.turned_k[:, :, now], v, **turned, turn_keys=False,
            **common,
        )  # fmt: skip
        expected = cache.decode(text.turned_q[:, :, now], text.turned_k[:, :, now], v)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(at_read, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(before, expected, rtol=tolerance, atol=tolerance)
        held = cache.keys.length
        assert torch.equal(turned["keys"][:, :, :held], cache.keys.entries())
        assert torch.equal(projected["values"][:, :, :held], cache.values.entries())


@pytest.mark.parametrize("turn_keys", [True, False])
@pytest.mark.parametrize("positions", ["cache", "fixed"])
@pytest.mark.parametrize("t", [0, 1, 3, 31, 32, 33, 34, 36, 37, 50])
def test_places_in_words(device, t, positions, turn_keys):
    """The reference turns every key to its place, one by one, and attends."""
    sinks, window, rope = 4, 32, Rope()
    text = Sequence(device, torch.float32, t, batch=1, n_kv=1, group=2, size=64, length=t + 1,
                    rope=rope)  # fmt: skip
    q, k = (text.q, text.k) if turn_keys else (text.turned_q, text.turned_k)
    now = slice(t, t + 1)
    ring = {"keys": text.ring(k, t, sinks, window), "values": text.ring(text.v, t, sinks, window)}
    out = ring_decode(
        q[:, :, now], k[:, :, now], text.v[:, :, now], **ring,
        n_tokens=torch.tensor([t], device=device), sinks=sinks, window=window,
        ring_start=max(t, sinks + window), rope=RingRope.make(rope, 64, device),
        partials=Partials.empty(2, 2, 64, device), turn_keys=turn_keys, positions=positions,
    )  # fmt: skip
    expected = ring_decode_reference(
        text.q[:, :, now], text.k, text.v, sinks=sinks, window=window, rope=rope,
        positions=positions,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_a_million_tokens_in(device):
    """Angles of 1e6 radians still turn the query as they should."""
    t, rope = 2**20 - 1, Rope()
    q, k, v = (torch.randn(1, n, 1, 64, device=device) for n in (2, 1, 1))
    keys, values = (torch.randn(1, 1, 8, 64, device=device) for _ in range(2))
    out = ring_decode(
        q, k, v, keys=keys.clone(), values=values.clone(),
        n_tokens=torch.tensor([t], device=device), sinks=4, window=4, ring_start=t,
        rope=RingRope.make(rope, 64, device), partials=Partials.empty(2, 1, 64, device),
        turn_keys=False,
    )  # fmt: skip
    angles = ((8 - t) * rope.frequencies(64, device)).double()  # fp32 angles, exact functions
    first, second = q.double().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    logits = torch.cat((turned @ keys[0, 0, :4].double().T, q.double() @ keys[0, 0, 4:].double().T,
                        q.double() @ k[0, 0].double().T), -1) / 8.0  # fmt: skip
    expected = logits.softmax(-1) @ torch.cat((values, v), 2)[0, 0].double()
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_are_refused(device):
    with pytest.raises(NotApplicableError, match="turns 16, 32"):
        RingRope.make(Rope(fraction=0.75), 128, device)
