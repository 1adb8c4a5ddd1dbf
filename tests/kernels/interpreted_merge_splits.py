"""Merging of split-KV partial results, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from measure.kernels import interpreted
from measure.kernels._splits import Partials, split_count
from measure.kernels.merge_splits import merge_splits, reference

assert interpreted()


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 3),
    splits=st.integers(1, 9),
    size=st.sampled_from([64, 128, 256]),
    empty=st.integers(0, 8),
    seed=st.integers(0, 2**31),
)
def test_merge_is_softmax_over_all_splits(rows, splits, size, empty, seed):
    # Scores and values of 5 keys per split, attended at once, are what the merge must find.
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, splits, 5, generator=generator) * 20
    values = torch.randn(rows, splits, 5, size, generator=generator)
    if splits > 1:
        scores[:, empty % splits] = float("-inf")
    m = scores.amax(-1)
    p = torch.where(m.unsqueeze(-1) > -1e30, torch.exp2(scores - m.unsqueeze(-1)), 0.0)
    acc = (p.unsqueeze(-1) * values).sum(-2)
    if splits > 1:
        acc[:, empty % splits] = float("nan")  # whatever was in the memory
    partials = Partials(acc, m, p.sum(-1))
    out, lse = torch.empty(rows, size), torch.empty(rows)
    merge_splits(partials, out, lse)
    weights = (scores.flatten(1) * torch.log(torch.tensor(2.0))).softmax(-1)
    expected = torch.einsum("rk,rkh->rh", weights, values.flatten(1, 2))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    total = torch.logsumexp(scores.flatten(1) * torch.log(torch.tensor(2.0)), -1)
    torch.testing.assert_close(lse * torch.log(torch.tensor(2.0)), total, rtol=1e-4, atol=1e-4)


def test_reference_agrees():
    partials = Partials(torch.randn(4, 3, 64), torch.randn(4, 3), torch.rand(4, 3) + 0.1)
    out, lse = torch.empty(4, 64), torch.empty(4)
    merge_splits(partials, out, lse)
    expected = reference(partials)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("units", "capacity", "expected"),
    # 132 SMs x 4 blocks: 8 heads of one sequence get 66 splits, of 8 sequences 8; 1 token gets 1.
    [(8, 2**20, 66), (64, 2**20, 8), (1024, 2**20, 1), (8, 1, 1), (8, 300, 3), (1, 2**20, 128)],
)
def test_splits_fill_the_device_once(units, capacity, expected):
    assert split_count(units, capacity, 128, 132) == expected
