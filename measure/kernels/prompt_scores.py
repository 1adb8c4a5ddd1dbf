"""What every key of a prompt received from its queries, without S x S scores in memory.

    received[j] = sum over queries i >= j, heads of the group: exp(q_i k_j / sqrt(D) - L_i)

Two passes: the log-sum-exps L (or those a flash kernel left), then the columns, for which the
logits are computed again. H2O takes all queries, SnapKV and PyramidKV the last w, TOVA the last one
and sums over all heads.

Per KV head, all queries: each pass multiplies G D S^2 (a causal half of 2 G D S^2), as much as QK^T
of the attention itself, and exponentiates G S^2 / 2 logits. Bytes: K once per tile of queries and
queries once per tile of keys, from L2; from memory about S D b (1 + G) a pass, and 4 S (G + 1) of
results, where scores in memory would be 4 G S^2. Ceiling: the matrix units at 16 bits, or 16
exponentials a clock and multiprocessor, whichever is slower: alike at D = 128 on an H200 (989
TFLOP/s dense against 132 * 16 * 1.75 GHz = 3.7e12: 267 FLOP per exponential, and 2 D = 256).
With w queries the passes read K twice: 2 S D b; ceiling: memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels import interpreted
from measure.kernels._compile import ARCHITECTURES, HOPPER, CompileCase, typed
from measure.kernels._softmax import LOG2_E, rows_of
from measure.kernels._splits import sm_count, split_count

#: Query rows (heads of the group times queries) and keys of a tile.
_ROWS, _KEYS = 128, 64


@triton.jit
def folded_rows(unit, tile, n_queries, GROUP: tl.constexpr, HEADS: tl.constexpr,
                QUERIES: tl.constexpr):  # fmt: skip
    """Rows of a tile of QUERIES queries of HEADS heads: (row of q, query, which exist)."""
    rows = tl.arange(0, HEADS * QUERIES)
    head, query = rows // QUERIES, tile * QUERIES + rows % QUERIES
    live = (head < GROUP) & (query < n_queries)
    return (unit * GROUP + head) * n_queries + query, query, live


@triton.jit
def load_tile(pointers, mask, WIDEN: tl.constexpr):
    """Load; widened to fp32 where the interpreter would compute in bf16."""
    tile = tl.load(pointers, mask=mask, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def row_log_sums_kernel(
    q, k, log_sums, scale, n_queries, n_keys, key_batch, key_head, key_token, split_keys,
    split_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of queries over one split of the keys; grid (tiles, units, splits)."""
    # the longest rows first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    unit, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row, query, live = folded_rows(unit, tile, n_queries, GROUP, HEADS, QUERIES)
    columns, inner = tl.arange(0, D), tl.arange(0, KEYS)
    queries = load_tile(q + row[:, None] * D + columns[None, :], live[:, None], WIDEN)
    position = n_keys - n_queries + query
    k += unit // KV_HEADS * key_batch + unit % KV_HEADS * key_head
    top = tl.full((HEADS * QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS * QUERIES,), tl.float32)
    start = split * split_keys
    stop = tl.minimum(start + split_keys, n_keys - n_queries + (tile + 1) * QUERIES)
    stop = tl.minimum(stop, n_keys)
    for first in range(start, stop, KEYS):
        key = (first + inner).to(tl.int64)
        keys = load_tile(
            k + key[None, :] * key_token + columns[:, None], (key < n_keys)[None, :], WIDEN
        )
        logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
        seen = (key[None, :] <= position[:, None]) & (key < stop)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - reference)
        total += tl.sum(tl.exp2(logits - reference[:, None]), 1)
        top = new_top
    # in natural units, as flash kernels leave them; a split that sees nothing leaves -inf
    summed = tl.log2(tl.where(total > 0.0, total, 1.0))
    natural = (top + summed) * 0.6931471805599453
    tl.store(log_sums + split * split_stride + row, natural, mask=live)


@triton.jit
def received_kernel(
    q, k, log_sums, received, scale, n_queries, n_keys, key_batch, key_head, key_token,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one tile of keys over all queries that see it; grid (key tiles, units)."""
    # the first keys have the most queries
    first, unit = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, D)
    key = (first + tl.arange(0, KEYS)).to(tl.int64)
    here = key < n_keys
    k += unit // KV_HEADS * key_batch + unit % KV_HEADS * key_head
    keys = load_tile(k + key[None, :] * key_token + columns[:, None], here[None, :], WIDEN)
    summed = tl.zeros((KEYS,), tl.float32)
    offset = n_keys - n_queries
    for tile in range(tl.maximum(first - offset, 0) // QUERIES, tl.cdiv(n_queries, QUERIES)):
        row, query, live = folded_rows(unit, tile, n_queries, GROUP, HEADS, QUERIES)
        queries = load_tile(q + row[:, None] * D + columns[None, :], live[:, None], WIDEN)
        log_sum = tl.load(log_sums + row, mask=live, other=0.0) * 1.4426950408889634
        logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
        seen = live[:, None] & (key[None, :] <= (offset + query)[:, None])
        summed += tl.sum(tl.where(seen, tl.exp2(logits - log_sum[:, None]), 0.0), 0)
    tl.store(received + unit * n_keys + key, summed, mask=here)


def received_scores(q: Tensor, k: Tensor, log_sums: Tensor | None = None) -> Tensor:
    """Probabilities every key received from the last queries, summed over the group.

    Parameters
    ----------
    q
        The last n queries [B, N, n, D] of the prompt.
    k
        All its keys [B, K, S, D], rows contiguous.
    log_sums
        Natural log-sum-exps fp32 [B, N, n] of the scaled causal logits, if a flash kernel left
        them; else they are computed first.

    Returns
    -------
    Tensor
        fp32 [B, K, S].
    """
    b, n_kv, n_keys, size = k.shape
    n_queries = q.shape[2]
    q = q.contiguous()
    group, units = q.shape[1] // n_kv, b * n_kv
    heads = triton.next_power_of_2(group)
    rows = _ROWS if size <= 128 else _ROWS // 2
    queries = max(1, min(rows // heads, triton.next_power_of_2(max(n_queries, 16))))
    tiles = -(-n_queries // queries)
    scale = size**-0.5 * LOG2_E
    precision = "ieee" if k.dtype == torch.float32 else "tf32"
    geometry = {
        "KV_HEADS": n_kv, "GROUP": group, "HEADS": heads, "QUERIES": queries, "KEYS": _KEYS,
        "D": size, "WIDEN": interpreted(), "PRECISION": precision,
        "num_warps": 8 if heads * queries >= _ROWS else 4,
    }  # fmt: skip
    if log_sums is None:
        splits = split_count(units * tiles, n_keys, 8 * _KEYS, sm_count(k.device))
        split_keys = -(-n_keys // (splits * _KEYS)) * _KEYS
        parts = torch.empty(splits, *q.shape[:3], device=k.device)
        row_log_sums_kernel[(tiles, units, splits)](
            q, k, parts, scale, n_queries, n_keys, *rows_of(k), split_keys, parts.stride(0),
            **geometry,
        )  # fmt: skip
        log_sums = parts[0] if splits == 1 else parts.logsumexp(dim=0)
    received = torch.empty(b, n_kv, n_keys, device=k.device)
    received_kernel[(-(-n_keys // _KEYS), units)](
        q, k, log_sums, received, scale, n_queries, n_keys, *rows_of(k), **geometry
    )
    return received


def received_scores_reference(q: Tensor, k: Tensor) -> Tensor:
    """The same from all scores at once."""
    _, n_kv, n_keys, size = k.shape
    n_queries = q.shape[2]
    queries = q.float().unflatten(1, (n_kv, -1)) * size**-0.5
    logits = queries @ k.float().unsqueeze(2).transpose(-1, -2)
    hidden = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).sum(dim=(2, 3))


def _case(name: str, size: int, queries: int, warps: int, *, columns: bool) -> CompileCase:
    strides = "key_batch key_head key_token"
    first_pass = "" if columns else "split_keys split_stride"
    return CompileCase(
        name=f"{name}, bf16, head {size}",
        kernel=received_kernel if columns else row_log_sums_kernel,
        signature=typed(
            {
                "*bf16": "q k",
                "*fp32": "log_sums received" if columns else "log_sums",
                "fp32": "scale",
                "i32": f"n_queries n_keys {strides} {first_pass}",
            }
        ),
        constants={
            "KV_HEADS": 8,
            "GROUP": 4,
            "HEADS": 4,
            "QUERIES": queries,
            "KEYS": _KEYS,
            "D": size,
            "WIDEN": False,
            "PRECISION": "tf32",
        },
        num_warps=warps,
        aligned=tuple(strides.split()),
        architectures=ARCHITECTURES if columns and size == 128 else HOPPER,
    )


COMPILE_CASES = (
    _case("log-sum-exps", 128, 32, 8, columns=False),
    _case("column sums", 128, 32, 8, columns=True),
    _case("column sums", 256, 16, 4, columns=True),
)
