"""A step of H2O or TOVA: attend, score what was attended, overwrite what leaves; three launches.

1. Every split attends its tokens. A token's probability needs the log-sum-exp of all splits, which
   none of them knows yet, so each writes its weights relative to its running maximum, and that
   maximum once per tile.
2. The merge knows the log-sum-exp. One program per KV head merges the output; others rescale
   tiles of weights, sum them over the group, add them to the scores and keep their lightest token.
3. The lightest token's slot takes K, V, score and position of the new one.

Bytes of a kept token and KV head, D = 128 in 16 bits, G query heads: K and V 4 D = 512; weights
written and read 2 * 2 G; score read and written 8, position 4. G = 4 gives 28 bytes, 5.5 % over
plain decode if all of it went to memory; the weights (2 G bytes a token, 3.4 MB at batch 8, 8 KV
heads, 6.6k kept) normally stay in L2. Weights in 16 bits are within 2^-11 of a probability, where
16-bit keys already move logits by 2^-9. TOVA keeps no scores and no positions.

Arithmetic: 2 matrix products of ROWS = 16 rows per element, one conversion: 2.4 T elements/s at
4.8 TB/s need 77 TFLOP/s of tf32, under a fifth of an H200's. Ceiling: memory bandwidth.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import CompileCase, typed
from measure.kernels._softmax import (
    LOG2_E,
    attend_tile,
    dot_precision,
    log_sums,
    merged_output,
    new_token_logits,
    rows_of,
    store_split,
    tile_rows,
    tile_tokens,
)
from measure.kernels._splits import Partials


@triton.jit
def scoring_split_kernel(
    q, keys, values, length, weights, tile_tops, acc_ptr, m_ptr, l_ptr, scale, capacity,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one KV head; grid (units, splits)."""
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = unit // HEADS, unit % HEADS
    n = tl.load(length)
    tiles = tl.cdiv(tl.cdiv(n, BLOCK), SPLITS)
    heads, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    columns, value_columns = tl.arange(0, D), tl.arange(0, DV)
    live = heads < GROUP
    at = (unit * GROUP + heads[:, None]) * D + columns[None, :]
    queries = tl.load(q + at, mask=live[:, None], other=0.0).to(tl.float32) * scale
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DV), tl.float32)
    stop = tl.minimum((split + 1) * tiles * BLOCK, n)
    for start in range(split * tiles * BLOCK, stop, BLOCK):
        tokens = (start + inner).to(tl.int64)
        seen = tokens < n
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
        top, total, out, attended = attend_tile(top, total, out, logits, value, PRECISION)
        rows = unit * GROUP + heads
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


@triton.jit
def evict_lightest_kernel(
    k, v, n_tokens, keys, values, scores, positions, new_scores, least_scores, least_slots,
    score_unit, position_unit,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
):  # fmt: skip
    """H2O: the lightest token of all chunks makes room, per KV head; grid (units)."""
    unit = tl.program_id(0).to(tl.int64)
    batch, head = unit // HEADS, unit % HEADS
    chunks = tl.arange(0, PADDED_CHUNKS)
    live = chunks < CHUNKS
    least = tl.load(least_scores + unit * CHUNKS + chunks, mask=live, other=float("inf"))
    chunk = tl.argmin(least, 0)
    slot = tl.load(least_slots + unit * CHUNKS + chunk).to(tl.int64)
    columns, value_columns = tl.arange(0, D), tl.arange(0, DV)
    at = batch * key_batch + head * key_head + slot * key_token
    tl.store(keys + at + columns, tl.load(k + unit * D + columns))
    at = batch * value_batch + head * value_head + slot * value_token
    tl.store(values + at + value_columns, tl.load(v + unit * DV + value_columns))
    tl.store(scores + unit * score_unit + slot, tl.load(new_scores + unit))
    position = tl.load(n_tokens).to(positions.dtype.element_ty)
    tl.store(positions + unit * position_unit + slot, position)


@triton.jit
def evict_least_kernel(
    k, v, length, keys, values, received, new_scores, capacity,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOVA: the token all heads together attended to least makes room in all; grid (batch)."""
    batch = tl.program_id(0).to(tl.int64)
    n = tl.load(length)
    inner = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    slot = inner
    new = 0.0
    for head in range(HEADS):
        new += tl.load(new_scores + batch * HEADS + head)
    for start in range(0, n, BLOCK):
        tokens = start + inner
        summed = tl.zeros((BLOCK,), tl.float32)
        for head in range(HEADS):
            at = (batch * HEADS + head) * capacity + tokens
            summed += tl.load(received + at, mask=tokens < n, other=float("inf"))
        lighter = summed < least
        least = tl.where(lighter, summed, least)
        slot = tl.where(lighter, tokens, slot)
    lightest = tl.min(least, 0)
    chosen = tl.min(tl.where(least == lightest, slot, 2147483647), 0).to(tl.int64)
    # a new token attended to less than any held one is not kept
    if new >= lightest:
        columns, value_columns = tl.arange(0, D), tl.arange(0, DV)
        for head in range(HEADS):
            unit = batch * HEADS + head
            at = batch * key_batch + head * key_head + chosen * key_token
            tl.store(keys + at + columns, tl.load(k + unit * D + columns))
            at = batch * value_batch + head * value_head + chosen * value_token
            tl.store(values + at + value_columns, tl.load(v + unit * DV + value_columns))


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
        chunks = -(-tiles // _CHUNK_TILES)
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


#: Tiles whose scores one program of the merge updates.
_CHUNK_TILES = 8


def h2o_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    length: Tensor,
    n_tokens: Tensor,
    recent: int,
    workspace: ScoringWorkspace,
) -> Tensor:
    """One step of H2O with all slots in use; everything held is updated in place.

    Parameters
    ----------
    q, k, v
        The new token: [B, N, 1, D], [B, K, 1, D], [B, K, 1, DV].
    keys, values
        Slots [B, K, C, D] and [B, K, C, DV]; rows contiguous.
    scores, positions
        fp32 and int32 [B, K, C]: what every slot's token received, and where it stands.
    length, n_tokens
        Integers on the device, one element: slots in use, and tokens seen before this one.
    recent
        Tokens, the new one included, that may not leave.

    Returns
    -------
    Tensor
        [B, N, 1, DV].
    """
    out = _attend_and_score(q, k, v, keys, values, scores, positions, length, n_tokens, recent,
                            workspace, heavy=True)  # fmt: skip
    units, chunks = workspace.least_scores.shape
    evict_lightest_kernel[(units,)](
        k.contiguous(), v.contiguous(), n_tokens, keys, values, scores, positions,
        workspace.new_scores, workspace.least_scores, workspace.least_slots,
        scores.stride(1), positions.stride(1), *rows_of(keys), *rows_of(values),
        HEADS=keys.shape[1], D=keys.shape[-1], DV=values.shape[-1], CHUNKS=chunks,
        PADDED_CHUNKS=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return out


def tova_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    workspace: ScoringWorkspace,
) -> Tensor:
    """One step of TOVA with all slots in use; shapes as for :func:`h2o_decode`."""
    received = workspace.received.view(*keys.shape[:2], -1)
    out = _attend_and_score(q, k, v, keys, values, received, None, length, length, 0, workspace,
                            heavy=False)  # fmt: skip
    evict_least_kernel[(keys.shape[0],)](
        k.contiguous(), v.contiguous(), length, keys, values, received, workspace.new_scores,
        received.stride(1), *rows_of(keys), *rows_of(values),
        HEADS=keys.shape[1], D=keys.shape[-1], DV=values.shape[-1], BLOCK=512, num_warps=4,
    )  # fmt: skip
    return out


def _attend_and_score(
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
    b, n_kv, _, size = keys.shape
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
        CHUNK_TILES=_CHUNK_TILES, HEAVY=heavy, num_warps=4,
    )  # fmt: skip
    return out


def h2o_decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    n_tokens: int,
    recent: int,
) -> Tensor:
    """What :func:`h2o_decode` does, in fp32 and plain torch, with all slots in use."""
    out, received = _attend_reference(q, k, v, keys, values)
    scores += received[..., :-1]
    candidates = scores.masked_fill(positions > n_tokens - recent, torch.inf)
    for index in torch.cartesian_prod(*map(torch.arange, keys.shape[:2])):
        b, head = index.tolist()
        slot = candidates[b, head].argmin()
        keys[b, head, slot], values[b, head, slot] = k[b, head, 0], v[b, head, 0]
        scores[b, head, slot] = received[b, head, -1]
        positions[b, head, slot] = n_tokens
    return out


def tova_decode_reference(
    q: Tensor, k: Tensor, v: Tensor, *, keys: Tensor, values: Tensor
) -> Tensor:
    """What :func:`tova_decode` does, in fp32 and plain torch, with all slots in use."""
    out, received = _attend_reference(q, k, v, keys, values)
    for b, least in enumerate(received.sum(dim=1).argmin(dim=-1).tolist()):
        if least < keys.shape[2]:
            keys[b, :, least], values[b, :, least] = k[b, :, 0], v[b, :, 0]
    return out


def _attend_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, and what every token received from its KV head's group [B, K, C + 1]."""
    all_keys, all_values = torch.cat((keys, k), 2).float(), torch.cat((values, v), 2).float()
    queries = q.float().reshape(*k.shape[:2], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    probabilities = (queries @ all_keys.transpose(-1, -2)).softmax(dim=-1)
    out = (probabilities @ all_values).reshape(*q.shape[:2], 1, -1)
    return out.to(q.dtype), probabilities.sum(dim=2)


_STRIDES = "key_batch key_head key_token value_batch value_head value_token"


def _split_case(size: int, group: int) -> CompileCase:
    return CompileCase(
        name=f"scoring split, bf16, head {size}, group {group}",
        kernel=scoring_split_kernel,
        signature=typed(
            {
                "*bf16": "q keys values",
                "*fp16": "weights",
                "*fp32": "tile_tops acc_ptr m_ptr l_ptr",
                "*i32": "length",
                "fp32": "scale",
                "i32": f"capacity {_STRIDES}",
            }
        ),
        constants={
            "HEADS": 8,
            "GROUP": group,
            "ROWS": tile_rows(group),
            "D": size,
            "DV": size,
            "SPLITS": 8,
            "BLOCK": tile_tokens(size),
            "PRECISION": "tf32",
        },
        aligned=tuple(_STRIDES.split()),
    )


def _merge_case(name: str, *, heavy: bool) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=merge_and_score_kernel,
        signature=typed(
            {
                "*bf16": "q k v out",
                "*fp16": "weights",
                "*fp32": "tile_tops acc_ptr m_ptr l_ptr scores new_scores least_scores",
                "*i32": "length positions least_slots",
                "*i64": "n_tokens",
                "fp32": "scale",
                "i32": "recent capacity score_unit position_unit",
            }
        ),
        constants={
            "GROUP": 4,
            "ROWS": 16,
            "D": 128,
            "DV": 128,
            "SPLITS": 8,
            "PADDED_SPLITS": 8,
            "BLOCK": 64,
            "CHUNKS": 13,
            "CHUNK_TILES": _CHUNK_TILES,
            "HEAVY": heavy,
        },
    )


COMPILE_CASES = (
    *(_split_case(size, group) for size, group in ((128, 4), (256, 8))),
    _merge_case("merge and scores, H2O", heavy=True),
    CompileCase(
        name="eviction, H2O",
        kernel=evict_lightest_kernel,
        signature=typed(
            {
                "*bf16": "k v keys values",
                "*fp32": "scores new_scores least_scores",
                "*i32": "positions least_slots",
                "*i64": "n_tokens",
                "i32": f"score_unit position_unit {_STRIDES}",
            }
        ),
        constants={"HEADS": 8, "D": 128, "DV": 128, "CHUNKS": 13, "PADDED_CHUNKS": 16},
        num_warps=1,
        aligned=tuple(_STRIDES.split()),
    ),
    CompileCase(
        name="eviction, TOVA",
        kernel=evict_least_kernel,
        signature=typed(
            {
                "*bf16": "k v keys values",
                "*fp32": "received new_scores",
                "*i32": "length",
                "i32": f"capacity {_STRIDES}",
            }
        ),
        constants={"HEADS": 8, "D": 128, "DV": 128, "BLOCK": 512},
        aligned=tuple(_STRIDES.split()),
    ),
)
