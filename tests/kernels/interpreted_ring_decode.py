"""Ring-buffer decode in both position schemes, against the twin and a reference in words."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
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
    Rope(fraction=0.75),
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
    heads=st.sampled_from([(2, 1), (1, 3), (1, 8)]),
    size=st.sampled_from([64, 128, 256]),
    sinks=st.sampled_from([0, 1, 4]),
    # a tile has 64 tokens (32 for heads of 256)
    window=st.sampled_from([3, 31, 63, 64, 65]),
    more=st.integers(0, 20),
    rope=st.sampled_from(ROPES),
    positions=st.sampled_from(["cache", "fixed"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    splits=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
@example((1, 3), 256, 4, 31, 3, ROPES[1], "fixed", torch.bfloat16, 2, 0)
def test_steps_are_the_twins(
    device, heads, size, sinks, window, more, rope, positions, dtype, splits, seed
):
    # with a short window past the ring's wrap
    (n_kv, group), steps, prompt = heads, 2, sinks + window + more
    batch = 3 - n_kv
    text = Sequence(device, dtype, seed, batch=batch, n_kv=n_kv, group=group, size=size,
                    length=prompt + steps, rope=rope)  # fmt: skip
    mixer = Attention(n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=size, v_head_dim=size)
    method = StreamingLLM(sink_tokens=sinks, window_tokens=window, positions=positions)
    cache = StreamingCache(method, mixer, batch=batch, dtype=dtype, device=device)
    cache.place(0, 1, rope)
    cache.store(*(x[:, :, :prompt] for x in (text.turned_k, text.v)))
    ring = {"keys": text.ring(text.turned_k, prompt, sinks, window),
            "values": text.ring(text.v, prompt, sinks, window)}  # fmt: skip
    partials = Partials.empty(batch * n_kv * group, splits, size, device)
    for t in range(prompt, prompt + steps):
        new = (x[:, :, t : t + 1] for x in (text.turned_q, text.turned_k, text.v))
        q, k, v = new
        out = ring_decode(
            q, k, v, **ring, n_tokens=torch.tensor([t], device=device), sinks=sinks,
            window=window, ring_start=prompt, rope=RingRope.make(rope, size, device),
            partials=partials, hide_oldest=positions == "fixed",
        )  # fmt: skip
        expected = cache.decode(q, k, v)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(ring["keys"], cache.keys.entries())
        assert torch.equal(ring["values"], cache.values.entries())


@pytest.mark.parametrize("hide_oldest", [False, True])
@pytest.mark.parametrize("t", [36, 37, 50, 90])
def test_places_in_words(device, t, hide_oldest):
    """The reference turns every key to its place, one by one, and attends."""
    sinks, window, rope = 4, 32, Rope()
    text = Sequence(device, torch.float32, t, batch=1, n_kv=1, group=2, size=64, length=t + 1,
                    rope=rope)  # fmt: skip
    now = slice(t, t + 1)
    ring = {"keys": text.ring(text.turned_k, t, sinks, window),
            "values": text.ring(text.v, t, sinks, window)}  # fmt: skip
    out = ring_decode(
        text.turned_q[:, :, now], text.turned_k[:, :, now], text.v[:, :, now], **ring,
        n_tokens=torch.tensor([t], device=device), sinks=sinks, window=window, ring_start=t,
        rope=RingRope.make(rope, 64, device), partials=Partials.empty(2, 2, 64, device),
        hide_oldest=hide_oldest,
    )  # fmt: skip
    expected = ring_decode_reference(
        text.q[:, :, now], text.k, text.v, sinks=sinks, window=window, rope=rope,
        hide_oldest=hide_oldest,
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
    )  # fmt: skip
    angles = ((8 - t) * rope.frequencies(64, device)).double()  # fp32 angles, exact functions
    first, second = q.double().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    logits = torch.cat((turned @ keys[0, 0, :4].double().T, q.double() @ keys[0, 0, 4:].double().T,
                        q.double() @ k[0, 0].double().T), -1) / 8.0  # fmt: skip
    expected = logits.softmax(-1) @ torch.cat((values, v), 2)[0, 0].double()
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=1e-5, atol=1e-5)


def test_heads_of_other_sizes_are_refused(device):
    q, k = (torch.zeros(1, 1, 1, 96, device=device) for _ in "qk")
    keys = torch.zeros(1, 1, 8, 96, device=device)
    with pytest.raises(NotApplicableError, match="got 96; --engine torch"):
        ring_decode(
            q, k, k, keys=keys, values=keys, n_tokens=torch.tensor([8]), sinks=4, window=4,
            ring_start=8, rope=RingRope.make(None, 96, device),
            partials=Partials.empty(1, 1, 96, device),
        )  # fmt: skip
