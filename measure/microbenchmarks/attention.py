"""Attention over a prompt, and of one token over rotating caches."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.kernels.curve_sizes import tiled_causal_pairs
from costmodel.kernels.curve_sizes import windowed as cut_by_window
from costmodel.kernels.curves import curve_name
from costmodel.mixers import Attention
from measure.engine import TORCH_DTYPES
from measure.microbenchmarks.bench import Bench
from measure.microbenchmarks.operations import point
from measure.parts import attend_prompt


def prefill(bench: Bench, dtype: str) -> None:
    """Causal attention of a prompt; seconds per FLOP of whole tiles."""
    heads = bench.plan.kv_heads
    for size in bench.plan.head_dims:
        points = []
        for s in bench.plan.prefill_tokens:
            q = torch.full((1, 2 * heads, s, size), 0.1, dtype=TORCH_DTYPES[dtype])
            k = torch.full((1, heads, s, size), 0.1, dtype=TORCH_DTYPES[dtype])
            call = partial(scaled_dot_product_attention, q, k, k, is_causal=True, enable_gqa=True)
            seconds, spread = bench.cold(call)
            flops = 4.0 * size * 2 * heads * float(tiled_causal_pairs(s))
            points.append((float(s), seconds / flops, spread))
        bench.results.add(curve_name("prefill_attention", dtype, head_dim=size), points)


def windowed(bench: Bench, dtype: str) -> None:
    """Prompts longer than the window that a token sees, masked block by block."""
    heads = bench.plan.kv_heads
    for size, window in itertools.product(bench.plan.head_dims, bench.plan.windows):
        tokens = 2 * window + 512
        mixer = Attention(
            n_heads=2 * heads,
            n_kv_heads=heads,
            head_dim=size,
            v_head_dim=size,
            window_tokens=window,
        )
        q = torch.full((1, 2 * heads, tokens, size), 0.1, dtype=TORCH_DTYPES[dtype])
        k = torch.full((1, heads, tokens, size), 0.1, dtype=TORCH_DTYPES[dtype])
        seconds, spread = bench.cold(partial(attend_prompt, q, k, k, window=window))
        where = cut_by_window(mixer.prefill(point(dtype, 1, tokens))[0])
        assert where is not None
        bench.results.add_point(
            curve_name(where.kind, dtype, head_dim=size),
            (float(where.size), seconds / float(where.work), spread),
        )


def decode(bench: Bench, dtype: str) -> None:
    """One token per sequence, the group as query length; seconds per byte of K and V."""
    heads = bench.plan.kv_heads
    for size, group in itertools.product(bench.plan.head_dims, bench.plan.groups):
        q = torch.full((1, heads, group, size), 0.1, dtype=TORCH_DTYPES[dtype])
        points = []
        for tokens in bench.plan.decode_tokens:
            elements = 2 * heads * tokens * size
            if not bench.fits(dtype, elements):
                break
            buffers = bench.rotating(dtype, 1, heads, tokens, size)
            seconds, spread = bench.cold(partial(_attend_next, q, buffers))
            n_bytes = float(elements * q.element_size())
            points.append((n_bytes, seconds / n_bytes, spread))
            bench.results.saw_cold_bytes(n_bytes / seconds)
        name = curve_name("decode_attention", dtype, head_dim=size, group=group)
        bench.results.add(name, points)


def _attend_next(q: Tensor, buffers: Iterator[Tensor]) -> None:
    scaled_dot_product_attention(q, next(buffers), next(buffers))
