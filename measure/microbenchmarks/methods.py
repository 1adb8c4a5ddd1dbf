"""What is left of the other methods once attention is taken off: unpacking, packing, page bounds.

Their twins run a step, and store a prompt; what other curves already price is subtracted.
"""

from functools import partial
from typing import NamedTuple

import torch

from costmodel.methods.base import AbstractMethod
from costmodel.methods.flexgen import FlexGen
from costmodel.methods.fp8_kv import Fp8Kv
from costmodel.methods.kvquant import KvQuant
from costmodel.methods.quest import Quest
from costmodel.mixers import Attention
from costmodel.operation import Operations
from measure.engine import TORCH_DTYPES
from measure.methods import layer_cache_class
from measure.methods.base import AbstractLayerCache
from measure.microbenchmarks.bench import Bench
from measure.microbenchmarks.operations import add, group_of, named, point, predicted_s
from measure.numerics import Rope

#: The least that is left of a difference on a disturbed machine.
_LEAST_SHARE = 0.05


class _Case(NamedTuple):
    """A method with the operations of a step and of a stored prompt that are its own."""

    method: AbstractMethod
    step: str
    store: str


_CASES = (
    _Case(FlexGen(), "dequantise_groups", "compress"),
    _Case(Fp8Kv(), "dequantise_fp8", "quantise_fp8"),
    _Case(KvQuant(), "dequantise_codebook", "quantise_codebook"),
    _Case(Quest(keep_tokens=256), "estimate_pages", "page_min_max"),
)


def others(bench: Bench, dtype: str) -> None:
    """Steps and stored prompts of every case."""
    plan = bench.plan
    heads, group, size = plan.kv_heads, plan.groups[-1], plan.head_dims[0]
    mixer = Attention(n_heads=heads * group, n_kv_heads=heads, head_dim=size, v_head_dim=size)
    for case in _CASES:
        for tokens in plan.method_tokens:
            cache = layer_cache_class(case.method.NAME)(
                case.method,
                mixer,
                batch=1,
                dtype=TORCH_DTYPES[dtype],
                device=torch.get_default_device(),
                reserve_tokens=tokens + 1,
            )
            cache.place(2, 3, Rope())
            k = torch.rand(1, heads, tokens, size).to(cache.dtype)
            store_s = bench.cold(partial(_store, cache, k))
            where = point(dtype, 1, tokens)
            after = case.method.after_prefill(group_of(mixer), where)
            _rest(bench, after, case.store, store_s, None)
            q = torch.rand(1, heads * group, 1, size).to(cache.dtype)
            step_s = bench.cold(partial(_step, cache, q, k[:, :, :1]))
            operations = case.method.decode(group_of(mixer), where)
            packed = case.step.startswith("dequantise")
            _rest(bench, operations, case.step, step_s, dtype if packed else None)


def _store(cache: AbstractLayerCache, k: torch.Tensor) -> None:
    cache.clear()
    cache.store(k, k)


def _step(cache: AbstractLayerCache, q: torch.Tensor, k: torch.Tensor) -> None:
    """One token, taken back."""
    before = cache.snapshot()
    cache.decode(q, k, k)
    cache.restore(before)


def _rest(
    bench: Bench,
    operations: Operations,
    name: str,
    whole: tuple[float, float],
    dtype: str | None,
) -> None:
    own = named(operations, name)
    seconds, spread = whole
    known = sum(predicted_s(bench.results, op) for op in operations if op is not own)
    rest = max(seconds - known, _LEAST_SHARE * seconds)
    add(bench.results, own, rest, spread, dtype=dtype)
