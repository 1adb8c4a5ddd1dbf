"""Decode attention with H2O's and TOVA's scores and eviction, against references and twins."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.methods.h2o import H2O
from costmodel.methods.tova import Tova
from costmodel.mixers import Attention
from measure.kernels.scored_decode import (
    ScoringWorkspace,
    h2o_decode,
    h2o_decode_reference,
    tova_decode,
    tova_decode_reference,
)
from measure.methods.h2o import H2OCache
from measure.methods.tova import TovaCache

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
#: a tile has 64 tokens (32 for heads of 256): one less, one, one more, several
HELD = st.sampled_from([1, 2, 31, 33, 63, 64, 65, 130])
SHAPES = dict(
    batch=st.integers(1, 2),
    n_kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4, 8]),
    size=st.sampled_from([64, 128, 256]),
    held=HELD,
    splits=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random(device, generator, dtype, *shape):
    return torch.randn(*shape, generator=generator).to(device, dtype)


def same_strides(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def integer(device, value):
    return torch.tensor([value], dtype=torch.int64, device=device)


def twin(cls, method, device, dtype, batch, n_kv, group, size):
    mixer = Attention(n_heads=n_kv * group, n_kv_heads=n_kv, head_dim=size, v_head_dim=size)
    return cls(method, mixer, batch=batch, dtype=dtype, device=device)


@FEW
@given(recent=st.integers(1, 40), **SHAPES)
def test_h2o_step(device, batch, n_kv, group, size, held, splits, dtype, seed, recent):
    generator = torch.Generator().manual_seed(seed)

    def new(heads, tokens=1):
        return random(device, generator, dtype, batch, heads, tokens, size)

    recent = min(recent, held)
    cache = twin(H2OCache, H2O(), device, dtype, batch, n_kv, group, size)
    cache.heavy, cache.recent, cache.n_tokens = held - recent, recent, 10 * held
    # Scores a few apart: no rounding decides who is the lightest.
    scores = torch.stack(
        [torch.randperm(held, generator=generator) for _ in range(batch * n_kv)]
    ).view(batch, n_kv, held)
    scores = (20.0 * scores).to(device)
    start = cache.n_tokens - torch.randperm(held, generator=generator) - 1
    positions = start.int().expand(batch, n_kv, -1).to(device)
    for buffer, entries in zip(
        cache._buffers(), (new(n_kv, held), new(n_kv, held), scores, positions), strict=True
    ):
        # room that is not in use: rows of a head do not follow those of the one before
        buffer.reserve(held + 3)
        buffer.append(entries)
    names = ("keys", "values", "scores", "positions")
    entries = [x.entries() for x in cache._buffers()]
    mine = {n: same_strides(x) for n, x in zip(names, entries, strict=True)}
    plain = {n: x.clone() for n, x in zip(names, entries, strict=True)}
    workspace = ScoringWorkspace.make(mine["keys"], mine["values"], group, splits)
    for _ in range(2):
        q, k, v = new(n_kv * group), new(n_kv), new(n_kv)
        out = h2o_decode(
            q, k, v, **mine, length=integer(device, held),
            n_tokens=integer(device, cache.n_tokens), recent=recent, workspace=workspace,
        )  # fmt: skip
        expected = h2o_decode_reference(q, k, v, **plain, n_tokens=cache.n_tokens, recent=recent)
        from_twin = cache.decode(q, k, v)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out, from_twin, rtol=2 * tolerance, atol=2 * tolerance)
        for name, held_by_twin in zip(names, cache._buffers(), strict=True):
            exact = name != "scores"
            for other, looser in ((plain[name], 1), (held_by_twin.entries(), 4)):
                torch.testing.assert_close(
                    mine[name], other,
                    rtol=0.0 if exact else looser * tolerance,
                    atol=0.0 if exact else looser * tolerance,
                )  # fmt: skip


@FEW
@given(**SHAPES)
def test_tova_step(device, batch, n_kv, group, size, held, splits, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def new(heads, tokens=1):
        return random(device, generator, dtype, batch, heads, tokens, size)

    cache = twin(TovaCache, Tova(keep_tokens=held), device, dtype, batch, n_kv, group, size)
    cache.n_tokens = 5 * held
    for buffer in cache._buffers():
        buffer.append(new(n_kv, held))
    mine = {"keys": cache.keys.entries().clone(), "values": cache.values.entries().clone()}
    workspace = ScoringWorkspace.make(mine["keys"], mine["values"], group, splits)
    for _ in range(2):
        q, k, v = new(n_kv * group), new(n_kv), new(n_kv)
        before = {n: x.clone() for n, x in mine.items()}
        plain = {n: x.clone() for n, x in mine.items()}
        out = tova_decode(q, k, v, **mine, length=integer(device, held), workspace=workspace)
        expected = tova_decode_reference(q, k, v, **plain)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        from_twin = cache.decode(q, k, v)
        torch.testing.assert_close(out, from_twin, rtol=2 * tolerance, atol=2 * tolerance)
        if dtype == torch.float32:
            assert torch.equal(mine["keys"], plain["keys"])
            assert torch.equal(mine["values"], cache.values.entries())
        else:
            check_least_left(q, k, before, mine, tolerance)
            for buffer, entries in zip(cache._buffers(), mine.values(), strict=True):
                buffer.clear()
                buffer.append(entries)


def check_least_left(q, k, before, after, tolerance):
    """Whatever was overwritten, in all heads, no token received noticeably less."""
    all_keys = torch.cat((before["keys"], k), 2).float()
    queries = q.float().reshape(*k.shape[:2], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    received = (queries @ all_keys.transpose(-1, -2)).softmax(-1).sum(dim=(1, 2))
    changed = (before["keys"] != after["keys"]).any(-1)
    for b in range(len(k)):
        slots = changed[b].nonzero()[:, 1].unique().tolist()
        left = slots[0] if slots else -1
        assert len(slots) <= 1
        assert received[b, left] <= received[b].min() * (1 + tolerance) + 1e-6


@pytest.mark.parametrize("held", [0, 1, 63, 64, 65])
def test_length_on_the_device_hides_unused_slots(device, held):
    generator = torch.Generator().manual_seed(held)
    keys, values = (random(device, generator, torch.float32, 1, 1, 70, 64) for _ in range(2))
    keys[:, :, held:] = values[:, :, held:] = float("nan")
    q, k, v = (random(device, generator, torch.float32, 1, n, 1, 64) for n in (4, 1, 1))
    expected = tova_decode_reference(
        q, k, v, keys=keys[:, :, :held].clone(), values=values[:, :, :held].clone()
    ) if held else v.expand(-1, 4, -1, -1)  # fmt: skip
    workspace = ScoringWorkspace.make(keys, values, 4, 3)
    out = tova_decode(
        q, k, v, keys=keys, values=values, length=integer(device, held), workspace=workspace
    )
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    assert keys[:, :, held:].isnan().all()
