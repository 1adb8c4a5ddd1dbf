"""A step of Quest: bound every page's scores, attend the best pages, widen the new token's page.

A page of p tokens keeps the elementwise minimum and maximum of its keys. What its keys can score is
at most sum_i max(q_i low_i, q_i high_i) = q+ . high + q- . low with q+ = max(q, 0), q- = min(q, 0):
two matrix products per tile of pages. A page's bound is the largest of the group's; ``torch.topk``
chooses among them, on the device.

Bytes of a step and KV head, T tokens, n chosen pages, D = DV: bounds 2 D b T / p, scores 4 T / p
written and read, chosen tokens 2 D b n p, new token 2 D b. With D = 128 in 16 bits, p = 16: 32.5
bytes a cached token (1/16 of its K and V) and 512 a chosen one. At 128k and 2048 tokens 5.3 MB
instead of 67 MB. A chosen page is p rows of 2 D bytes in one piece, 4 KiB at p = 16. Ceiling:
memory bandwidth; at 32k x batch 1 the four launches and the choice (about 10 us) take longer.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import HOPPER, CompileCase, typed
from measure.kernels._softmax import (
    LOG2_E,
    attend_tokens,
    dot_precision,
    load_queries,
    merge_unit,
    nothing_yet,
    replace_token,
    rows_of,
    store_split,
    tile_rows,
    tile_tokens,
)
from measure.kernels._splits import Partials
from measure.kernels._tiles import check_heads

#: Pages whose bounds one program computes.
_PAGES = 64


@triton.jit
def bounds_kernel(
    q, low, high, bounds, n_tokens, low_batch, low_head, low_page, high_batch, high_head, high_page,
    bound_unit, page_tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    PAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Bounds [units, pages] of a tile of pages, -inf where no page is; grid (tiles, units)."""
    unit = tl.program_id(1).to(tl.int64)
    batch, head = unit // HEADS, unit % HEADS
    page = (tl.program_id(0) * PAGES + tl.arange(0, PAGES)).to(tl.int64)
    there = page < tl.cdiv(tl.load(n_tokens), page_tokens)
    columns, live = tl.arange(0, D), tl.arange(0, ROWS) < GROUP
    queries = load_queries(q, unit, 1.0, GROUP, ROWS, D)
    low += batch * low_batch + head * low_head
    high += batch * high_batch + head * high_head
    least = tl.load(
        low + page[None, :] * low_page + columns[:, None], mask=there[None, :], other=0.0
    ).to(tl.float32)
    most = tl.load(
        high + page[None, :] * high_page + columns[:, None], mask=there[None, :], other=0.0
    ).to(tl.float32)
    bound = tl.dot(tl.maximum(queries, 0.0), most, input_precision=PRECISION)
    bound = tl.dot(tl.minimum(queries, 0.0), least, bound, input_precision=PRECISION)
    bound = tl.max(tl.where(live[:, None], bound, float("-inf")), 0)
    tl.store(
        bounds + unit * bound_unit + page,
        tl.where(there, bound, float("-inf")),
        mask=page < bound_unit,
    )


@triton.jit
def pages_split_kernel(
    q, keys, values, chosen, n_tokens, acc_ptr, m_ptr, l_ptr, scale, n_chosen, page_tokens,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the chosen pages' tokens; grid (units, splits)."""
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(n_tokens)
    inner = tl.arange(0, BLOCK)
    queries = load_queries(q, unit, scale, GROUP, ROWS, D)
    keys += unit // HEADS * key_batch + unit % HEADS * key_head
    values += unit // HEADS * value_batch + unit % HEADS * value_head
    top, total, out = nothing_yet(ROWS, DV)
    n_places = n_chosen * page_tokens
    tiles = tl.cdiv(tl.cdiv(n_places, BLOCK), SPLITS)
    stop = tl.minimum((split + 1) * tiles * BLOCK, n_places)
    for start in range(split * tiles * BLOCK, stop, BLOCK):
        place = start + inner
        listed = place < n_places
        page = tl.load(chosen + unit * n_chosen + place // page_tokens, mask=listed, other=0)
        tokens = page.to(tl.int64) * page_tokens + place % page_tokens
        top, total, out, _ = attend_tokens(
            queries, keys, values, tokens, listed & (tokens < n), key_token, value_token, top,
            total, out, PRECISION,
        )  # fmt: skip
    store_split(acc_ptr, m_ptr, l_ptr, unit, split, top, total, out, GROUP, ROWS, SPLITS, DV)


@triton.jit
def merge_and_append_kernel(
    q, k, v, keys, values, low, high, n_tokens, acc_ptr, m_ptr, l_ptr, out, scale, page_tokens,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    low_batch, low_head, low_page, high_batch, high_head, high_page,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits and the new token, append it and widen its page; grid (units)."""
    unit = tl.program_id(0).to(tl.int64)
    merge_unit(
        q, k, v, acc_ptr, m_ptr, l_ptr, out, unit, scale, GROUP, ROWS, D, DV, SPLITS,
        PADDED_SPLITS,
    )  # fmt: skip
    batch, head = unit // HEADS, unit % HEADS
    n = tl.load(n_tokens).to(tl.int64)
    page = n // page_tokens
    replace_token(k, v, keys, values, unit, n, key_batch, key_head, key_token, value_batch,
                  value_head, value_token, HEADS, D, DV)  # fmt: skip
    columns = tl.arange(0, D)
    key = tl.load(k + unit * D + columns).to(tl.float32)
    opened = n % page_tokens == 0
    at = low + batch * low_batch + head * low_head + page * low_page + columns
    least = tl.load(at).to(tl.float32)
    least = tl.where(opened, key, tl.minimum(least, key))
    tl.store(at, least.to(low.dtype.element_ty))
    at = high + batch * high_batch + head * high_head + page * high_page + columns
    most = tl.load(at).to(tl.float32)
    most = tl.where(opened, key, tl.maximum(most, key))
    tl.store(at, most.to(high.dtype.element_ty))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PageCache:
    """What Quest holds: room for every token and page; rows are contiguous.

    keys [B, K, C, D], values [B, K, C, DV], low and high [B, K, ceil(C / p), D]
    """

    keys: Tensor
    values: Tensor
    low: Tensor
    high: Tensor
    page_tokens: int


def page_bounds(q: Tensor, cache: PageCache, n_tokens: Tensor) -> Tensor:
    """Largest possible logit (unscaled) of every page, fp32 [B, K, pages]; -inf: no such page.

    q [B, N, 1, D]; ``n_tokens`` is an integer on the device.
    """
    b, n_kv, n_pages, size = cache.low.shape
    group, units = q.shape[1] // n_kv, b * n_kv
    bounds = torch.empty(b, n_kv, n_pages, device=q.device)
    bounds_kernel[(-(-n_pages // _PAGES), units)](
        q.contiguous(), cache.low, cache.high, bounds, n_tokens, *rows_of(cache.low),
        *rows_of(cache.high), n_pages, cache.page_tokens,
        HEADS=n_kv, GROUP=group, ROWS=tile_rows(group), D=size, PAGES=_PAGES,
        PRECISION=dot_precision(cache.low.dtype), num_warps=4,
    )  # fmt: skip
    return bounds


def quest_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache: PageCache,
    n_tokens: Tensor,
    n_chosen: int,
    partials: Partials,
) -> Tensor:
    """One step: choose ``n_chosen`` pages per KV head, attend them and the new token, append it.

    Parameters
    ----------
    q, k, v
        The new token: [B, N, 1, D], [B, K, 1, D], [B, K, 1, DV].
    n_tokens
        Tokens held before this one, an integer on the device.
    partials
        Made for B N rows.

    Returns
    -------
    Tensor
        [B, N, 1, DV].
    """
    b, n_kv, _, size = cache.keys.shape
    v_size, units, group = cache.values.shape[-1], b * n_kv, q.shape[1] // n_kv
    check_heads(q.shape[1], n_kv, size, v_size)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    bounds = page_bounds(q, cache, n_tokens)
    chosen = bounds.topk(min(n_chosen, bounds.shape[-1]), dim=-1, sorted=False).indices
    rows, splits, scale = tile_rows(group), partials.splits, size**-0.5 * LOG2_E
    parts = (partials.acc, partials.m, partials.l)
    strides = (*rows_of(cache.keys), *rows_of(cache.values))
    pages_split_kernel[(units, splits)](
        q, cache.keys, cache.values, chosen, n_tokens, *parts, scale, chosen.shape[-1],
        cache.page_tokens, *strides,
        HEADS=n_kv, GROUP=group, ROWS=rows, D=size, DV=v_size, SPLITS=splits,
        BLOCK=tile_tokens(max(size, v_size)), PRECISION=dot_precision(cache.keys.dtype),
        num_warps=4,
    )  # fmt: skip
    out = torch.empty(b, q.shape[1], 1, v_size, dtype=q.dtype, device=q.device)
    merge_and_append_kernel[(units,)](
        q, k, v, cache.keys, cache.values, cache.low, cache.high, n_tokens, *parts, out, scale,
        cache.page_tokens, *strides, *rows_of(cache.low), *rows_of(cache.high),
        HEADS=n_kv, GROUP=group, ROWS=rows, D=size, DV=v_size, SPLITS=splits,
        PADDED_SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out


def quest_decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    page_tokens: int,
    n_chosen: int,
) -> Tensor:
    """The same from the tokens held, keys [B, K, T, D], in fp32 and loops."""
    b, n_kv, t, size = keys.shape
    queries = q.float().reshape(b, n_kv, -1, size)
    out = torch.empty(*queries.shape[:3], v.shape[-1])
    pages = [slice(s, min(t, s + page_tokens)) for s in range(0, t, page_tokens)]
    for i in range(b):
        for j in range(n_kv):
            held, held_v = keys[i, j].float(), values[i, j].float()
            bounds = [
                max(
                    torch.maximum(one * held[p].amin(0), one * held[p].amax(0)).sum().item()
                    for one in queries[i, j]
                )
                for p in pages
            ]
            best = sorted(range(len(pages)), key=lambda x: -bounds[x])[:n_chosen]
            kept = [token for x in best for token in range(t)[pages[x]]]
            seen = torch.cat((held[kept], k[i, j].float()))
            weights = (queries[i, j] @ seen.T * size**-0.5).softmax(-1)
            out[i, j] = weights @ torch.cat((held_v[kept], v[i, j].float()))
    return out.reshape(b, -1, 1, v.shape[-1]).to(q.device, q.dtype)


_TOKENS = "key_batch key_head key_token value_batch value_head value_token"
_PAGE_STRIDES = "low_batch low_head low_page high_batch high_head high_page"


def _cases(size: int, group: int) -> tuple[CompileCase, ...]:
    shape = {"HEADS": 8, "GROUP": group, "ROWS": tile_rows(group), "D": size}
    parts = "acc_ptr m_ptr l_ptr"
    return (
        CompileCase(
            name=f"bounds, bf16, head {size}, group {group}",
            kernel=bounds_kernel,
            signature=typed(
                {
                    "*bf16": "q low high",
                    "*fp32": "bounds",
                    "*i64": "n_tokens",
                    "i32": f"{_PAGE_STRIDES} bound_unit page_tokens",
                }
            ),
            constants={**shape, "PAGES": _PAGES, "PRECISION": "tf32"},
            aligned=(*_PAGE_STRIDES.split(), "page_tokens"),
            architectures=HOPPER,
        ),
        CompileCase(
            name=f"chosen pages, bf16, head {size}, group {group}",
            kernel=pages_split_kernel,
            signature=typed(
                {
                    "*bf16": "q keys values",
                    "*fp32": parts,
                    "*i64": "chosen n_tokens",
                    "fp32": "scale",
                    "i32": f"n_chosen page_tokens {_TOKENS}",
                }
            ),
            constants={
                **shape,
                "DV": size,
                "SPLITS": 8,
                "BLOCK": tile_tokens(size),
                "PRECISION": "tf32",
            },
            aligned=(*_TOKENS.split(), "page_tokens"),
        ),
        CompileCase(
            name=f"merge and append, bf16, head {size}, group {group}",
            kernel=merge_and_append_kernel,
            signature=typed(
                {
                    "*bf16": "q k v keys values low high out",
                    "*fp32": parts,
                    "*i64": "n_tokens",
                    "fp32": "scale",
                    "i32": f"page_tokens {_TOKENS} {_PAGE_STRIDES}",
                }
            ),
            constants={**shape, "DV": size, "SPLITS": 8, "PADDED_SPLITS": 8},
            aligned=(*_TOKENS.split(), *_PAGE_STRIDES.split(), "page_tokens"),
            architectures=HOPPER,
        ),
    )


COMPILE_CASES = _cases(128, 4)
