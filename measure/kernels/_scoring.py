"""Attention that finds what every token received: two of the launches of H2O's and TOVA's steps.

1. Every split attends its tokens. A token's probability needs the log-sum-exp of all splits, which
   none of them knows yet, so each writes its weights relative to its running maximum, and that
   maximum once per tile.
2. The merge knows the log-sum-exp. One program per KV head merges the output; others rescale
   tiles of weights, sum them over the group, add them to the scores and keep their lightest token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._softmax import (
    LOG2_E,
    attend_tokens,
    dot_precision,
    load_queries,
    log_sums,
    merged_output,
    new_token_logits,
    nothing_yet,
    rows_of,
    store_split,
    tile_rows,
    tile_tokens,
)
from measure.kernels._splits import Partials
from measure.kernels._tiles import check_heads

#: Tiles whose scores one program of the merge updates.
CHUNK_TILES = 8


@triton.jit
def scoring_split_kernel(
    q, keys, values, length, weights, tile_tops, acc_ptr, m_ptr, l_ptr, scale, capacity,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one KV head; grid (units, splits)."""
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(length)
    tiles = tl.cdiv(tl.cdiv(n, BLOCK), SPLITS)
    heads, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    live, rows = heads < GROUP, unit * GROUP + heads
    queries = load_queries(q, unit, scale, GROUP, ROWS, D)
    keys += unit // HEADS * key_batch + unit % HEADS * key_head
    values += unit // HEADS * value_batch + unit % HEADS * value_head
    top, total, out = nothing_yet(ROWS, DV)
    stop = tl.minimum((split + 1) * tiles * BLOCK, n)
    for start in range(split * tiles * BLOCK, stop, BLOCK):
        tokens = (start + inner).to(tl.int64)
        seen = tokens < n
        top, total, out, attended = attend_tokens(
            queries, keys, values, tokens, seen, key_token, value_token, top, total, out, PRECISION
        )
        tl.store(
            weights + rows[:, None] * capacity + tokens[None, :],
            attended.to(weights.dtype.element_ty),
            mask=live[:, None] & seen[None, :],
        )
        tile = rows * tl.cdiv(capacity, BLOCK) + start // BLOCK
        tl.store(tile_tops + tile, top, mask=live)
    store_split(acc_ptr, m_ptr, l_ptr, unit, split, top, total, out, GROUP, ROWS, SPLITS, DV)


@triton.jit
def merge_and_score_kernel(
    q, k, v, length, n_tokens, weights, tile_tops, acc_ptr, m_ptr, l_ptr, out, scores, positions,
    new_scores, least_scores, least_slots, scale, recent, capacity, score_unit, position_unit,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK_TILES: tl.constexpr, HEAVY: tl.constexpr,
):  # fmt: skip
    """Output of one KV head, or the scores of one chunk of its tokens; grid (units, chunks + 1).

    HEAVY adds to ``scores`` and looks for the lightest token among those that are not recent; else
    ``scores`` is overwritten and nothing is looked for.
    """
    unit, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    live = heads < GROUP
    logits = new_token_logits(q, k, unit, scale, GROUP, ROWS, D)
    log_sum = log_sums(m_ptr, l_ptr, unit, logits, GROUP, ROWS, SPLITS, PADDED_SPLITS)
    if chunk == CHUNKS:
        columns = tl.arange(0, DV)
        value = tl.load(v + unit * DV + columns).to(tl.float32)
        received = tl.exp2(logits - log_sum)
        merged = merged_output(
            acc_ptr, m_ptr, unit, log_sum, received, value, GROUP, ROWS, SPLITS, DV
        )
        at = (unit * GROUP + heads[:, None]) * DV + columns[None, :]
        tl.store(out + at, merged.to(out.dtype.element_ty), mask=live[:, None])
        tl.store(new_scores + unit, tl.sum(tl.where(live, received, 0.0), 0))
    else:
        n = tl.load(length)
        rows = unit * GROUP + heads
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        slot = inner
        for tile in range(chunk * CHUNK_TILES, (chunk + 1) * CHUNK_TILES):
            tokens = (tile * BLOCK + inner).to(tl.int64)
            seen = tokens < n
            both = live[:, None] & seen[None, :]
            attended = tl.load(
                weights + rows[:, None] * capacity + tokens[None, :], mask=both, other=0.0
            ).to(tl.float32)
            reference = tl.load(
                tile_tops + rows * tl.cdiv(capacity, BLOCK) + tile,
                mask=live & (tile * BLOCK + 0 * heads < n),
                other=float("-inf"),
            )
            share = tl.where(live, tl.exp2(reference - log_sum), 0.0)
            received = tl.sum(attended * share[:, None], 0)
            at = unit * score_unit + tokens
            if HEAVY:
                received += tl.load(scores + at, mask=seen, other=0.0)
                position = tl.load(positions + unit * position_unit + tokens, mask=seen, other=0)
                old = seen & (position <= tl.load(n_tokens) - recent)
                lighter = old & (received < least)
                least = tl.where(lighter, received, least)
                slot = tl.where(lighter, tile * BLOCK + inner, slot)
            tl.store(scores + at, received, mask=seen)
        if HEAVY:
            lightest = tl.min(least, 0)
            # of equally light ones the first
            first = tl.min(tl.where(least == lightest, slot, 2147483647), 0)
            tl.store(least_scores + unit * CHUNKS + chunk, lightest)
            tl.store(least_slots + unit * CHUNKS + chunk, first)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, weakref_slot=True)
class ScoringWorkspace:
    """Room of a step's launches; made once, used by all layers and steps.

    partials   what the splits leave for the merge
    weights    [units, G, capacity] relative to the running maximum: fp16, or fp32 for fp32 caches
    tile_tops  fp32 [units, G, tiles], that maximum
    received   fp32 [units, capacity], probabilities summed over the group (TOVA)
    new_scores, least_scores, least_slots  the new token's score; the lightest token of every chunk
    """

    partials: Partials
    weights: Tensor
    tile_tops: Tensor
    received: Tensor
    new_scores: Tensor
    least_scores: Tensor
    least_slots: Tensor

    @classmethod
    def make(cls, keys: Tensor, values: Tensor, group: int, splits: int) -> "ScoringWorkspace":
        """Room for caches [B, K, C, H] like these with ``group`` query heads per KV head."""
        b, n_kv, capacity, size = keys.shape
        units, device = b * n_kv, keys.device
        block = tile_tokens(max(size, values.shape[-1]))
        tiles = -(-capacity // block)
        chunks = -(-tiles // CHUNK_TILES)
        weight_type = torch.float32 if keys.dtype == torch.float32 else torch.float16
        return cls(
            partials=Partials.empty(units * group, splits, values.shape[-1], device),
            weights=torch.empty(units, group, capacity, dtype=weight_type, device=device),
            tile_tops=torch.empty(units, group, tiles, device=device),
            received=torch.empty(units, capacity, device=device),
            new_scores=torch.empty(units, device=device),
            least_scores=torch.empty(units, chunks, device=device),
            least_slots=torch.empty(units, chunks, dtype=torch.int32, device=device),
        )


def attend_and_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor | None,
    length: Tensor,
    n_tokens: Tensor,
    recent: int,
    w: ScoringWorkspace,
    *,
    heavy: bool,
) -> Tensor:
    """Output of the step; ``scores`` and what the workspace says of them are brought up to it."""
    b, n_kv, _, size = keys.shape
    check_heads(q.shape[1], n_kv, size, values.shape[-1])
    v_size, units, capacity = values.shape[-1], b * n_kv, w.weights.shape[2]
    group = q.shape[1] // n_kv
    block, rows = tile_tokens(max(size, v_size)), tile_rows(group)
    scale = size**-0.5 * LOG2_E
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    parts, splits = (w.partials.acc, w.partials.m, w.partials.l), w.partials.splits
    scoring_split_kernel[(units, splits)](
        q, keys, values, length, w.weights, w.tile_tops, *parts, scale, capacity,
        *rows_of(keys), *rows_of(values), HEADS=n_kv, GROUP=group, ROWS=rows, D=size, DV=v_size,
        SPLITS=splits, BLOCK=block, PRECISION=dot_precision(keys.dtype), num_warps=4,
    )  # fmt: skip
    out = torch.empty(b, q.shape[1], 1, v_size, dtype=q.dtype, device=q.device)
    chunks = w.least_scores.shape[1]
    held = scores if positions is None else positions
    merge_and_score_kernel[(units, chunks + 1)](
        q, k, v, length, n_tokens, w.weights, w.tile_tops, *parts, out, scores, held,
        w.new_scores, w.least_scores, w.least_slots, scale, recent, capacity,
        scores.stride(1), held.stride(1), GROUP=group, ROWS=rows, D=size, DV=v_size,
        SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits), BLOCK=block, CHUNKS=chunks,
        CHUNK_TILES=CHUNK_TILES, HEAVY=heavy, num_warps=4,
    )  # fmt: skip
    return out


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, and what every token received from its KV head's group [B, K, C + 1]."""
    all_keys, all_values = torch.cat((keys, k), 2).float(), torch.cat((values, v), 2).float()
    queries = q.float().reshape(*k.shape[:2], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    probabilities = (queries @ all_keys.transpose(-1, -2)).softmax(dim=-1)
    out = (probabilities @ all_values).reshape(*q.shape[:2], 1, -1)
    return out.to(q.dtype), probabilities.sum(dim=2)
