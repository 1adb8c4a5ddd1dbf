"""Decode attention with H2O's scores and eviction, against the reference and the twin."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring import FEW, SHAPES, TOLERANCE, integer, random, twin

from costmodel.methods.h2o import H2O
from measure.kernels._scoring import ScoringWorkspace
from measure.kernels.h2o_decode import h2o_decode, h2o_decode_reference
from measure.methods.h2o import H2OCache


def same_strides(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


@FEW
@given(recent=st.integers(1, 40), **SHAPES)
def test_h2o_step(device, heads, size, held, splits, dtype, seed, recent):
    batch, n_kv, group = heads
    generator = torch.Generator().manual_seed(seed)

    def new(n, tokens=1):
        return random(device, generator, dtype, batch, n, tokens, size)

    recent = min(recent, held)
    cache = twin(H2OCache, H2O(), device, dtype, heads, size)
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
