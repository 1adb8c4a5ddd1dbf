"""Quest's bounds, choice, attention over chosen pages and page updates, against the twin."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.methods.quest import Quest
from costmodel.mixers import Attention
from measure.kernels._splits import Partials
from measure.kernels.quest_decode import (
    PageCache,
    page_bounds,
    quest_decode,
    quest_decode_reference,
)
from measure.methods.quest import QuestCache

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n_kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4, 8]),
    size=st.sampled_from([64, 128, 256]),
    # 64 pages are a tile; pages not full, just full, just opened
    held=st.sampled_from([49, 63, 64, 65, 100, 300]),
    page=st.sampled_from([4, 16]),
    dtype=st.sampled_from(list(TOLERANCE)),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_steps_are_the_twins(device, n_kv, group, size, held, page, dtype, splits, seed):
    batch, keep, steps = 3 - n_kv, 48, 2
    generator = torch.Generator().manual_seed(seed)

    def new(heads, tokens=1):
        return torch.randn(batch, heads, tokens, size, generator=generator).to(device, dtype)

    mixer = Attention(n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=size, v_head_dim=size)
    twin = QuestCache(
        Quest(page_tokens=page, keep_tokens=keep), mixer, batch=batch, dtype=dtype, device=device,
        reserve_tokens=held + steps,
    )  # fmt: skip
    twin.place(2, 3)
    k, v = new(n_kv, held), new(n_kv, held)
    twin.store(k, v)
    room = {}
    for name, buffer in zip(("keys", "values", "low", "high"), twin._buffers(), strict=True):
        room[name] = torch.full_like(buffer._data, float("nan"))
        room[name][:, :, : buffer.length] = buffer.entries()
    cache = PageCache(**room, page_tokens=page)
    partials = Partials.empty(batch * n_kv * group, splits, size, device)
    n_chosen = max(3, keep // page)
    tolerance = TOLERANCE[dtype]
    for t in range(held, held + steps):
        q, k, v = new(n_kv * group), new(n_kv), new(n_kv)
        n_tokens = torch.tensor([t], device=device)
        bounds = page_bounds(q, cache, n_tokens)
        n_pages = -(-t // page)
        one = twin.fold(q).float().unsqueeze(3)
        low, high = (x.entries().unsqueeze(2).float() for x in (twin.low, twin.high))
        expected = torch.maximum(one * low, one * high).sum(-1).amax(2)
        torch.testing.assert_close(bounds[..., :n_pages], expected, rtol=1e-4, atol=1e-3)
        assert bounds[..., n_pages:].isneginf().all()
        tokens = {"keys": cache.keys[:, :, :t].clone(), "values": cache.values[:, :, :t].clone()}
        out = quest_decode(
            q, k, v, cache=cache, n_tokens=n_tokens, n_chosen=n_chosen, partials=partials
        )
        from_twin = twin.decode(q, k, v)
        reference = quest_decode_reference(q, k, v, **tokens, page_tokens=page, n_chosen=n_chosen)
        torch.testing.assert_close(out, reference, rtol=tolerance, atol=tolerance)
        if dtype == torch.float32:  # the twin's bounds are rounded to the cache's dtype
            torch.testing.assert_close(out, from_twin, rtol=tolerance, atol=tolerance)
        for tensor, buffer in zip(room.values(), twin._buffers(), strict=True):
            assert torch.equal(tensor[:, :, : buffer.length], buffer.entries())
            assert tensor[:, :, buffer.length :].isnan().all()
