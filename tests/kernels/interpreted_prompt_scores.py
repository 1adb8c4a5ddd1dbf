"""What keys received from a prompt's queries, against the reference and the twins' own sums."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from costmodel.methods.snapkv import SnapKV
from costmodel.mixers import Attention
from measure.kernels import prompt_scores
from measure.kernels.prompt_scores import received_scores, received_scores_reference
from measure.methods.kept_tokens import query_blocks
from measure.methods.snapkv import SnapKVCache

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 2),
    n_kv=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4, 8]),
    size=st.sampled_from([64, 128, 256]),
    n_keys=st.sampled_from([1, 2, 63, 64, 65, 130]),
    share=st.sampled_from(["all", "window", "last"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_sums(device, batch, n_kv, group, size, n_keys, share, dtype, splits, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_kv * group, n_keys, size, generator=generator).to(device, dtype)
    k = torch.randn(batch, n_keys, n_kv, size, generator=generator).to(device, dtype)
    k = k.transpose(1, 2)  # as a projection leaves it
    n_queries = {"all": n_keys, "window": min(32, n_keys), "last": 1}[share]
    window = q[:, :, n_keys - n_queries :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_scores, "split_count", lambda *_: splits)
        received = received_scores(window, k)
    expected = received_scores_reference(window, k)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(received, expected, rtol=tolerance, atol=tolerance)
    if share == "all" and dtype == torch.float32:
        from_twin = torch.zeros_like(received)
        for _, stop, weights in query_blocks(q, k):
            from_twin[..., :stop] += weights.sum(dim=(2, 3))
        torch.testing.assert_close(received, from_twin, rtol=tolerance, atol=tolerance)
    # every query hands out exactly one, whatever the sums are made of
    total = float(batch * n_kv * group * n_queries)
    assert received.sum().item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("n_keys", [64, 100, 130])
def test_votes_are_the_twins(device, n_keys):
    mixer = Attention(n_heads=8, n_kv_heads=2, head_dim=64, v_head_dim=64)
    cache = SnapKVCache(
        SnapKV(window_tokens=16), mixer, batch=1, dtype=torch.float32, device=device
    )
    q, k = torch.randn(1, 8, 16, 64, device=device), torch.randn(1, 2, n_keys, 64, device=device)
    expected = cache._votes(q, k)
    torch.testing.assert_close(received_scores(q, k), expected, rtol=1e-4, atol=1e-5)


def test_log_sums_of_a_flash_kernel_are_taken_as_they_are(device):
    q, k = torch.randn(1, 4, 70, 64, device=device), torch.randn(1, 1, 70, 64, device=device)
    logits = q @ k.transpose(-1, -2) / 8.0
    hidden = torch.ones(70, 70, dtype=torch.bool, device=device).triu(1)
    log_sums = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
    expected = received_scores_reference(q, k)
    torch.testing.assert_close(received_scores(q, k, log_sums), expected, rtol=1e-4, atol=1e-4)
