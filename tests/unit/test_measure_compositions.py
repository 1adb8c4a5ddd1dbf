"""MInference's sparse prompt and methods behind one another, against slow and obvious code."""

import pytest
import torch
from twin_cases import BATCH, HEADS, KV_HEADS, cache, part, probabilities, tokens

from costmodel.errors import NotApplicableError
from costmodel.methods.parse import parse_method
from measure.methods import prompt_attention_class

GROUP = HEADS // KV_HEADS


def minference(kept: int):
    return prompt_attention_class("minference")(
        parse_method(f"minference:kept_tokens={kept}").methods[0]
    )


@pytest.mark.parametrize(("n", "kept"), [(100, 24), (97, 40), (33, 1), (300, 200), (290, 128)])
def test_every_query_attends_its_columns_and_blocks_once(n, kept):
    attention, (q, k, v) = minference(kept), tokens(n)
    found = attention.attend(q, k, v)
    columns, diagonals = attention.chosen(q, k)
    g = attention.block
    assert columns.shape[-1] + g * diagonals.shape[-1] == kept
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(0, n, 3):
                seen = range(i + 1)
                if i >= kept // g * g:
                    blocks = {i // g - d for d in diagonals[b, h].tolist()}
                    kept_columns = set(columns[b, h].tolist())
                    seen = [j for j in seen if j in kept_columns or j // g in blocks]
                    assert len(seen) <= kept
                one = h // GROUP
                expected = probabilities(q[b, h, i], k[b, one, seen]) @ v[b, one, seen]
                torch.testing.assert_close(found[b, h, i], expected, atol=1e-5, rtol=1e-4)


def test_the_last_queries_choose_columns_and_diagonals():
    n, kept = 200, 128
    attention, (q, k, _) = minference(kept), tokens(n)
    columns, diagonals = attention.chosen(q, k)
    g = attention.block
    for b in range(BATCH):
        for h in range(HEADS):
            vertical, slash = torch.zeros(n), torch.zeros(-(-n // g))
            for i in range(n - 64, n):
                weights = probabilities(q[b, h, i], k[b, h // GROUP, : i + 1])
                vertical[: i + 1] += weights
                for j, w in enumerate(weights):
                    slash[i // g - j // g] += w
            best = 30 + vertical[30:].topk(columns.shape[-1] - 30).indices
            assert columns[b, h].tolist() == sorted([*range(30), *best.tolist()])
            rest = 1 + slash[1:].topk(diagonals.shape[-1] - 1).indices
            assert diagonals[b, h].tolist() == sorted([0, *rest.tolist()])


def test_what_all_queries_may_see_is_full_attention_exactly():
    sparse, full, qkv = cache("minference:kept_tokens=40"), cache("full"), tokens(40)
    assert torch.equal(sparse.prefill(*qkv), full.prefill(*qkv))
    assert torch.equal(sparse.keys.entries(), full.keys.entries())


@pytest.mark.parametrize("store", ["kivi:group=8,residual_tokens=16", "flexgen:group=8", "fp8_kv"])
@pytest.mark.parametrize("n", [20, 40])
def test_a_store_behind_an_evictor_is_given_what_the_evictor_keeps(store, n):
    evict, qkv = "snapkv:keep_tokens=24,window_tokens=4", tokens(n + 10)
    both, choice, alone = cache(f"{evict}+{store}"), cache(evict), cache(store)
    assert torch.equal(both.prefill(*part(qkv, 0, n)), choice.prefill(*part(qkv, 0, n)))
    alone.store(choice.inner.keys.entries(), choice.inner.values.entries())
    for t in range(n, n + 10):
        mark = both.snapshot()
        both.decode(*part(qkv, t - 1, t))  # a wrong token, undone
        both.restore(mark)
        step = part(qkv, t, t + 1)
        assert torch.equal(both.decode(*step), alone.decode(*step))
        assert (both.n_tokens, both.inner.n_tokens) == (t + 1, min(n, 24) + t + 1 - n)
        assert both.held_bytes == alone.held_bytes


def test_a_sparse_prompt_before_a_store_changes_the_prompt_alone():
    qkv = tokens(60)
    both, sparse = (
        cache("minference:kept_tokens=16+kivi:group=8,residual_tokens=16"),
        minference(16),
    )
    plain = cache("kivi:group=8,residual_tokens=16")
    assert torch.equal(both.prefill(*part(qkv, 0, 50)), sparse.attend(*part(qkv, 0, 50)))
    plain.store(*part(qkv, 0, 50)[1:])
    step = part(qkv, 50, 51)
    assert torch.equal(both.decode(*step), plain.decode(*step))


def test_combinations_that_cannot_run_say_why():
    with pytest.raises(NotApplicableError, match="every head keeps other positions"):
        cache("snapkv+kvquant")
    with pytest.raises(NotApplicableError, match="do not compose"):
        cache("kivi+flexgen")
    with pytest.raises(NotApplicableError, match="gear is priced but cannot be run here"):
        cache("gear")
