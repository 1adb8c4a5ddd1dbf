"""What methods add that drop tokens: scores of a prompt, banded prompts, steps over kept tokens.

The twins themselves are run. A step of H2O is timed whole and over its attention alone: the rest
is what updates the scores and finds the slot.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from costmodel.methods.base import AbstractMethod
from costmodel.methods.chains import select
from costmodel.methods.h2o import H2O
from costmodel.methods.streaming_llm import StreamingLLM
from costmodel.mixers import Attention
from costmodel.operation import Operation
from measure.engine import TORCH_DTYPES
from measure.methods.base import AbstractLayerCache
from measure.methods.h2o import H2OCache, received_scores
from measure.methods.kept_tokens import gather_tokens
from measure.methods.streaming_llm import StreamingCache
from measure.microbenchmarks.bench import Bench
from measure.microbenchmarks.operations import add, group_of, named, point
from measure.numerics import Rope

#: Sinks of the windows that are timed.
_SINKS = 4
#: Query heads per KV head of the prompts: what a head takes does not depend on it.
_PROMPT_GROUP = 4


def prompts(bench: Bench, dtype: str) -> None:
    """Score sums of H2O and the band of StreamingLLM, over prompts."""
    plan = bench.plan
    for size in plan.head_dims:
        mixer = _mixer(bench, size, _PROMPT_GROUP)
        for tokens in plan.scored_tokens:
            q, k = _heads(mixer, dtype, tokens)
            seconds, spread = bench.cold(partial(received_scores, q, k))
            where = point(dtype, 1, tokens)
            operations = H2O().prefill_attention(group_of(mixer), where, mixer.prefill(where))
            _add(bench, named(operations, "score_pass"), seconds, spread, dtype)
        for window in plan.windows:
            method = StreamingLLM(sink_tokens=_SINKS, window_tokens=window - _SINKS)
            tokens = 2 * window
            q, k = _heads(mixer, dtype, tokens)
            cache = _cache(StreamingCache, method, mixer, dtype, tokens)

            def banded(cache: AbstractLayerCache = cache, q: Tensor = q, k: Tensor = k) -> None:
                cache.clear()
                cache.prefill(q, k, k)

            seconds, spread = bench.cold(banded)
            where = point(dtype, 1, tokens)
            operations = method.prefill_attention(group_of(mixer), where, mixer.prefill(where))
            _add(bench, named(operations, "banded_attention"), seconds, spread, dtype)


def steps(bench: Bench, dtype: str) -> None:
    """Steps of H2O and StreamingLLM over the tokens they keep."""
    plan = bench.plan
    for size, group, kept in itertools.product(plan.head_dims, plan.step_groups, plan.kept_tokens):
        mixer = _mixer(bench, size, group)
        _scored_step(bench, dtype, mixer, kept, evict=size == plan.head_dims[0])
        _sink_step(bench, dtype, mixer, kept)


def selection(bench: Bench) -> None:
    """Top-k of scores, and copies of the tokens it chose."""
    heads, size = bench.plan.kv_heads, bench.plan.head_dims[-1]
    for tokens in bench.plan.selected_tokens:
        scores = torch.rand(1, heads, tokens)
        keep = tokens // 5

        def choose(scores: Tensor = scores, keep: int = keep) -> Tensor:
            return scores.topk(keep, dim=-1).indices.sort(dim=-1).values

        seconds, spread = bench.cold(choose)
        operation = select("select", rows=float(heads), length=float(tokens), keep=float(keep))
        add(bench.results, operation, seconds, spread, dtype=None)
        x, chosen = torch.rand(1, heads, tokens, size), choose()
        seconds, spread = bench.cold(partial(gather_tokens, x, chosen))
        moved = 2.0 * heads * keep * size * x.element_size()
        operation = Operation(name="gather_kept", kind="elementwise", workspace_bytes=moved)
        add(bench.results, operation, seconds, spread, dtype=None)


def _scored_step(bench: Bench, dtype: str, mixer: Attention, kept: int, *, evict: bool) -> None:
    method = H2O(heavy_fraction=0.5, recent_fraction=0.25)
    tokens = kept * 4 // 3
    q, k = _heads(mixer, dtype, 1)
    caches = _pair(H2OCache, method, mixer, dtype, tokens)
    attend = [
        partial(c.attend_with_new, q, c.keys.entries(), c.values.entries(), k, k) for c in caches
    ]
    attention_s, spread = bench.far(*attend)
    operations = method.decode(group_of(mixer), point(dtype, 1, tokens))
    _add(bench, named(operations, "scored_attention"), attention_s, spread, dtype)
    if evict:
        step_s, spread = bench.far(*(partial(c.decode, q, k, k) for c in caches))
        rest = max(step_s - attention_s, 0.05 * step_s)
        add(bench.results, named(operations, "update_and_evict"), rest, spread, dtype=None)


def _sink_step(bench: Bench, dtype: str, mixer: Attention, kept: int) -> None:
    method = StreamingLLM(sink_tokens=_SINKS, window_tokens=kept - _SINKS)
    q, k = _heads(mixer, dtype, 1)
    caches = _pair(StreamingCache, method, mixer, dtype, kept + 1)
    seconds, spread = bench.far(*(partial(c.decode, q, k, k) for c in caches))
    operations = method.decode(group_of(mixer), point(dtype, 1, kept + 1))
    _add(bench, named(operations, "sink_attention"), seconds, spread, dtype)


def _add(bench: Bench, operation: Operation, seconds: float, spread: float, dtype: str) -> None:
    add(bench.results, operation, seconds, spread, dtype=dtype)


def _mixer(bench: Bench, size: int, group: int) -> Attention:
    heads = bench.plan.kv_heads
    return Attention(n_heads=heads * group, n_kv_heads=heads, head_dim=size, v_head_dim=size)


def _heads(mixer: Attention, dtype: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Random queries and keys."""
    shape = (tokens, mixer.head_dim)
    q = torch.rand(1, mixer.n_heads, *shape).to(TORCH_DTYPES[dtype])
    return q, torch.rand(1, mixer.n_kv_heads, *shape).to(TORCH_DTYPES[dtype])


def _cache(
    twin: Callable[..., Any], method: AbstractMethod, mixer: Attention, dtype: str, tokens: int
) -> Any:
    cache = twin(
        method,
        mixer,
        batch=1,
        dtype=TORCH_DTYPES[dtype],
        device=torch.get_default_device(),
        reserve_tokens=tokens,
    )
    cache.place(0, 1, Rope())
    return cache


def _pair(
    twin: Callable[..., Any], method: AbstractMethod, mixer: Attention, dtype: str, tokens: int
) -> list[Any]:
    """Two caches with ``tokens`` seen: one is timed, the other runs before it."""
    caches = [_cache(twin, method, mixer, dtype, tokens) for _ in range(2)]
    for cache in caches:
        cache.fill(tokens)
    return caches
