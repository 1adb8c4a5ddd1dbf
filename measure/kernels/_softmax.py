"""What the split-KV kernels share: one tile of online softmax, and merging with the new token.

A split leaves its part in :class:`~measure.kernels._splits.Partials`. The merge treats the step's
new token, which is not in the cache yet, as one split more. Scores are in units of log2.

Whatever is stored in 16 bits is raised to fp32 right after the load. tf32 keeps every bit of it, so
the matrix units multiply exactly what was stored; fp32 storage is multiplied in full precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
#: Rows of a tile of the matrix units; smaller groups of query heads are padded to it.
_TILE_ROWS = 16


@triton.jit
def attend_tile(top, total, out, logits, values, PRECISION: tl.constexpr):
    """Take one tile into the running softmax.

    logits [G, T] (-inf: hidden), values [T, D] -> (top, total, out, weights relative to top).
    """
    new_top = tl.maximum(top, tl.max(logits, 1))
    # rows that have seen nothing yet stay at -inf without making NaN
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - reference[:, None])
    kept = tl.exp2(top - reference)
    total = total * kept + tl.sum(weights, 1)
    out = out * kept[:, None] + tl.dot(weights, values, input_precision=PRECISION)
    return new_top, total, out, weights


@triton.jit
def load_queries(q, unit, scale, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Queries [ROWS, D] of one KV head, of which GROUP rows count, times ``scale``."""
    heads, columns = tl.arange(0, ROWS), tl.arange(0, D)
    at = (unit * GROUP + heads[:, None]) * D + columns[None, :]
    return tl.load(q + at, mask=(heads < GROUP)[:, None], other=0.0).to(tl.float32) * scale


@triton.jit
def nothing_yet(ROWS: tl.constexpr, DV: tl.constexpr):
    """Running softmax (top, total, out) before the first tile."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DV), tl.float32)


@triton.jit
def attend_tokens(
    queries, keys, values, tokens, seen, key_token, value_token, top, total, out,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take tokens [T] (int64, those ``seen``) of one head's keys and values into the softmax."""
    columns, value_columns = tl.arange(0, queries.shape[1]), tl.arange(0, out.shape[1])
    key = tl.load(
        keys + tokens[None, :] * key_token + columns[:, None], mask=seen[None, :], other=0.0
    ).to(tl.float32)
    logits = tl.dot(queries, key, input_precision=PRECISION)
    logits = tl.where(seen[None, :], logits, float("-inf"))
    value = tl.load(
        values + tokens[:, None] * value_token + value_columns[None, :],
        mask=seen[:, None],
        other=0.0,
    ).to(tl.float32)
    return attend_tile(top, total, out, logits, value, PRECISION)


@triton.jit
def replace_token(
    k, v, keys, values, unit, slot,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Write the new token's k [units, D] and v [units, DV] to ``slot`` (int64) of its head."""
    batch, head = unit // HEADS, unit % HEADS
    columns, value_columns = tl.arange(0, D), tl.arange(0, DV)
    at = batch * key_batch + head * key_head + slot * key_token
    tl.store(keys + at + columns, tl.load(k + unit * D + columns))
    at = batch * value_batch + head * value_head + slot * value_token
    tl.store(values + at + value_columns, tl.load(v + unit * DV + value_columns))


@triton.jit
def store_split(acc_ptr, m_ptr, l_ptr, unit, split, top, total, out, GROUP: tl.constexpr,
                ROWS: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """Leave a split's results: [ROWS] and [ROWS, DV], of which GROUP rows count."""
    heads, columns = tl.arange(0, ROWS), tl.arange(0, DV)
    live = heads < GROUP
    at = (unit * GROUP + heads) * SPLITS + split
    tl.store(m_ptr + at, top, mask=live)
    tl.store(l_ptr + at, total, mask=live)
    tl.store(acc_ptr + at[:, None] * DV + columns[None, :], out, mask=live[:, None])


@triton.jit
def log_sums(m_ptr, l_ptr, unit, new_logits, GROUP: tl.constexpr, ROWS: tl.constexpr,
             SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr):  # fmt: skip
    """Log-sum-exp (base 2) [ROWS] over all splits of ``unit`` and the new token's logits."""
    heads, splits = tl.arange(0, ROWS), tl.arange(0, PADDED_SPLITS)
    at = (unit * GROUP + heads[:, None]) * SPLITS + splits[None, :]
    live = (heads < GROUP)[:, None] & (splits < SPLITS)[None, :]
    top = tl.load(m_ptr + at, mask=live, other=float("-inf"))
    total = tl.load(l_ptr + at, mask=live, other=0.0)
    largest = tl.maximum(tl.max(top, 1), new_logits)
    summed = tl.sum(total * tl.exp2(top - largest[:, None]), 1) + tl.exp2(new_logits - largest)
    return largest + tl.log2(summed)


@triton.jit
def merged_output(acc_ptr, m_ptr, unit, log_sum, new_weights, new_value, GROUP: tl.constexpr,
                  ROWS: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """Normalised output [ROWS, DV] of all splits and the new token."""
    heads, columns = tl.arange(0, ROWS), tl.arange(0, DV)
    live = heads < GROUP
    out = new_weights[:, None] * new_value[None, :]
    # some loads at a time: each waits for memory
    for split in tl.range(0, SPLITS, loop_unroll_factor=4):
        at = (unit * GROUP + heads) * SPLITS + split
        top = tl.load(m_ptr + at, mask=live, other=float("-inf"))
        part = tl.load(acc_ptr + at[:, None] * DV + columns[None, :], mask=live[:, None], other=0.0)
        out += part * tl.exp2(top - log_sum)[:, None]
    return out


@triton.jit
def new_token_logits(q, k, unit, scale, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Logits [ROWS] of the new token: q [units, G, D], k [units, D]."""
    heads, columns = tl.arange(0, ROWS), tl.arange(0, D)
    live = heads < GROUP
    at = (unit * GROUP + heads[:, None]) * D + columns[None, :]
    queries = tl.load(q + at, mask=live[:, None], other=0.0).to(tl.float32)
    key = tl.load(k + unit * D + columns).to(tl.float32)
    return tl.sum(queries * key[None, :], 1) * scale


@triton.jit
def merge_unit(
    q, k, v, acc_ptr, m_ptr, l_ptr, out, unit, scale, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Write out [units, G, DV] of one unit: all splits and the new token."""
    heads, columns = tl.arange(0, ROWS), tl.arange(0, DV)
    logits = new_token_logits(q, k, unit, scale, GROUP, ROWS, D)
    log_sum = log_sums(m_ptr, l_ptr, unit, logits, GROUP, ROWS, SPLITS, PADDED_SPLITS)
    value = tl.load(v + unit * DV + columns).to(tl.float32)
    weights = tl.exp2(logits - log_sum)
    merged = merged_output(acc_ptr, m_ptr, unit, log_sum, weights, value, GROUP, ROWS, SPLITS, DV)
    at = (unit * GROUP + heads[:, None]) * DV + columns[None, :]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=(heads < GROUP)[:, None])
    return weights


def tile_rows(group: int) -> int:
    """Rows of the tile that holds a group of query heads."""
    return max(_TILE_ROWS, triton.next_power_of_2(group))


def tile_tokens(size: int) -> int:
    """Tokens of one tile: K and V tiles of 16 KiB each in 16 bits."""
    return max(16, min(64, 8192 // size))


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 holds 16-bit storage exactly; fp32 storage is multiplied in fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def rows_of(x: Tensor) -> tuple[int, int, int]:
    """Strides (batch, head, token) of a cache [B, K, C, H] whose rows are contiguous."""
    if x.stride(-1) != 1:
        raise ValueError(f"expected rows of stride 1, got strides {x.stride()}")
    return x.stride(0), x.stride(1), x.stride(2)
