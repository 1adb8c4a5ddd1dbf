"""Decode attention with TOVA's choice and eviction, against the reference and the twin."""

import pytest
import torch
from hypothesis import given
from scoring import FEW, SHAPES, TOLERANCE, integer, random, twin

from costmodel.methods.tova import Tova
from measure.kernels._scoring import ScoringWorkspace
from measure.kernels.tova_decode import tova_decode, tova_decode_reference
from measure.methods.tova import TovaCache


@FEW
@given(**SHAPES)
def test_tova_step(device, heads, size, held, splits, dtype, seed):
    batch, n_kv, group = heads
    generator = torch.Generator().manual_seed(seed)

    def new(n, tokens=1):
        return random(device, generator, dtype, batch, n, tokens, size)

    cache = twin(TovaCache, Tova(keep_tokens=held), device, dtype, heads, size)
    cache.n_tokens = 5 * held
    for buffer in (cache.keys, cache.values):
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
            for buffer, entries in zip((cache.keys, cache.values), mine.values(), strict=True):
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
