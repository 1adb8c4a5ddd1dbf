"""RG-LRU's scan, against the recurrence and the mixer's own scan."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from measure.kernels.rglru_scan import rglru_scan, rglru_scan_reference
from measure.mixers.base import linear_scan

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 2),
    # a tile has 32 tokens
    tokens=st.sampled_from([1, 31, 32, 33, 70]),
    channels=st.sampled_from([5, 16]),
    segments=st.integers(1, 3),
    first=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_scan(small_tiles, device, batch, tokens, channels, segments, first, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    x, recurrence, entry = (2 * new(batch, tokens, channels).to(dtype) for _ in range(3))
    decay, state = new(channels), new(batch, channels)
    expected_state, before = state.clone(), state.clone()
    expected = rglru_scan_reference(x, recurrence, entry, decay, expected_state, first=first)
    out = rglru_scan(x, recurrence, entry, decay, state, first=first, segments=segments)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, expected_state, rtol=2e-5, atol=2e-5)
    # the mixer's form: decays first, then one associative scan
    log_a = -8.0 * recurrence.float().sigmoid() * softplus(decay)
    scale = torch.sqrt(-torch.expm1(2 * log_a))
    if first:
        scale[:, 0] = 1.0
    states = linear_scan(log_a.exp(), scale * entry.float().sigmoid() * x.float(), before)
    torch.testing.assert_close(out.float(), states, rtol=tolerance, atol=tolerance)


def test_slow_decays_keep_their_small_steps(small_tiles, device):
    """1 - a^2 of decays next to 1 comes from no difference of near equals."""
    x = torch.ones(1, 3, 4, device=device)
    gates, decay = torch.full_like(x, -12.0), torch.full((4,), -6.0, device=device)
    state, expected_state = torch.zeros(1, 4, device=device), torch.zeros(1, 4, device=device)
    out = rglru_scan(x, gates, x, decay, state, first=False)
    expected = rglru_scan_reference(x, gates, x, decay, expected_state, first=False)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0.0)


@pytest.fixture(scope="module")
def small_tiles():
    """The interpreter composes element by element: few channels a program."""
    from measure.kernels import interpreted, rglru_scan

    with pytest.MonkeyPatch.context() as patch:
        if interpreted():
            patch.setattr(rglru_scan, "_CHANNELS", 8)
        yield
