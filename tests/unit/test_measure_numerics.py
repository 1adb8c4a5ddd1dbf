"""Masks, scans and routing against loops that are obviously right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.engines import load_engine
from costmodel.kernels.curve_sizes import MASKED_QUERY_TOKENS
from measure import parts
from measure.config_numerics import numerics_of
from measure.mixers.base import linear_scan
from measure.mixers.rwkv5 import recur
from measure.mlps import route
from measure.numerics import Routing

torch.set_num_threads(1)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 23),
    reach=st.integers(1, 24),
    kind=st.sampled_from(["window", "chunk", "full"]),
    cap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
)
def test_blocks_of_queries_equal_attention_token_by_token(length, reach, kind, cap, with_sinks):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 4, length, 8, generator=generator)
    k, v = (torch.randn(2, 2, length, 8, generator=generator) for _ in range(2))
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    expected = torch.empty_like(q)
    for head in range(4):
        for t in range(length):
            first = {"window": max(0, t - reach + 1), "chunk": t // reach * reach, "full": 0}[kind]
            keys, values = (x[:, head // 2, first : t + 1] for x in (k, v))
            scores = (keys @ q[:, head, t, :, None]).squeeze(-1) / 8**0.5
            if cap:
                scores = cap * torch.tanh(scores / cap)
            weights = scores.exp()
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total = total + sinks[head].exp()
            expected[:, head, t] = (weights / total)[:, None].matmul(values).squeeze(1)
    limits = {} if kind == "full" else {kind: reach}
    found = parts.attend_prompt(q, k, v, cap=cap, sinks=sinks, block=5, **limits)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_cost_model_counts_the_blocks_that_are_masked():
    assert parts.QUERY_BLOCK == MASKED_QUERY_TOKENS == load_engine("torch").score_block_tokens


@given(length=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_the_associative_scan_is_the_recurrence(length):
    a, b = torch.rand(2, 2, length, 3, generator=torch.Generator().manual_seed(length))
    state = torch.ones(2, 3)
    found = linear_scan(a, b, state)
    for t in range(length):
        state = a[:, t] * state + b[:, t]
        torch.testing.assert_close(found[:, t], state)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 37])
def test_rwkv5_in_chunks_is_the_recurrence(length):
    generator = torch.Generator().manual_seed(length)
    r, k, v = (torch.randn(2, 3, length, 4, generator=generator) for _ in range(3))
    log_decay, bonus = -torch.rand(2, 3, 1, 4, generator=generator)
    log_decay = 6 * log_decay  # so strong that inverse powers over a chunk would overflow
    state, s = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    found = recur(r, k, v, log_decay, bonus, state, 16)
    for t in range(length):
        outer = k[:, :, t, :, None] * v[:, :, t, None, :]
        read = s + bonus.transpose(-1, -2) * outer
        expected = (r[:, :, t, :, None] * read).sum(-2)
        torch.testing.assert_close(found[:, :, t], expected, atol=1e-5, rtol=1e-4)
        s = log_decay.exp().transpose(-1, -2) * s + outer
    torch.testing.assert_close(state, s, atol=1e-5, rtol=1e-4)


def test_routing_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    weights, chosen = route(logits, Routing(), 2)
    assert chosen.tolist() == [[1, 2]]
    # e^2 / (e^2 + e) = 0.7311, the other 0.2689
    torch.testing.assert_close(weights, torch.tensor([[0.7311, 0.2689]]), atol=1e-4, rtol=0)
    # one group of two: the first pair's sigmoids sum to 1.381, the second pair's to 1.000
    grouped = Routing(score="sigmoid", normalise=False, scale=2.0, groups=2, top_groups=1)
    weights, chosen = route(logits, grouped, 2)
    assert sorted(chosen[0].tolist()) == [0, 1]
    torch.testing.assert_close(weights, torch.tensor([[1.7616, 1.0]]), atol=1e-4, rtol=0)


def test_old_and_new_spellings_of_rotary_settings_agree():
    scaling = {"factor": 8.0, "original_max_position_embeddings": 64}
    old = numerics_of("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **scaling}})
    new = numerics_of(
        "llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", **scaling}}
    )
    assert old.rope == new.rope
    assert old.rope.amplitude == pytest.approx(1.20794, abs=1e-5)  # 0.1 ln 8 + 1
