"""Mamba-2's chunked scan, against the recurrence and the mixer's own chunks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.mixers.mamba2 import Mamba2
from measure.kernels.ssd_scan import ssd_scan, ssd_scan_reference
from measure.mixers.mamba2 import Mamba2Runner
from measure.numerics import Numerics

TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@settings(
    max_examples=7, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    p=st.sampled_from([16, 64]),
    n=st.sampled_from([16, 128]),
    tokens=st.sampled_from([1, 15, 16, 17, 64, 65, 130]),
    chunk=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_scan(device, batch, heads, p, n, tokens, chunk, dtype, seed):
    heads, groups = heads
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(batch, *shape, generator=generator).to(device)

    x = new(tokens, heads, p).to(dtype)
    b, c = (new(tokens, groups, n).to(dtype) * n**-0.5 for _ in range(2))
    decay, state = -new(tokens, heads).exp(), new(heads, p, n)
    expected_state, twin_state = state.clone(), state.clone()
    expected = ssd_scan_reference(x, b, c, decay, expected_state)
    y = ssd_scan(x, b, c, decay, state, chunk)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, expected_state, rtol=2e-4, atol=2e-4)
    mixer = Mamba2(
        n_heads=heads, head_dim=p, d_state=n, n_groups=groups, conv_kernel=4, chunk_tokens=chunk
    )
    runner = Mamba2Runner(mixer, Numerics())
    y_twin = runner._prompt(x.float(), b.float(), c.float(), decay, twin_state)
    torch.testing.assert_close(y.float(), y_twin, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, twin_state, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("decay", [0.0, -80.0])
def test_decays_of_nothing_and_of_everything(device, decay):
    x, b, c = (torch.ones(1, 40, 1, 16, device=device) for _ in range(3))
    state = torch.full((1, 1, 16, 16), 3.0, device=device)
    y = ssd_scan(x, b, c, torch.full((1, 40, 1), decay, device=device), state, 16)
    steps = torch.arange(1.0, 41.0, device=device)
    # each token adds b c = 16 to every output; without decay the 3 of the start stays
    expected = 16.0 * (steps + 3.0) if decay == 0.0 else torch.full_like(steps, 16.0)
    torch.testing.assert_close(y[0, :, 0, 0], expected)
