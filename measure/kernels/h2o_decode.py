"""A step of H2O: attend, score what was attended, overwrite the lightest; three launches.

The first two are ``_scoring``'s: splits that leave their weights, and a merge that makes scores of
them. In the third the lightest token's slot takes K, V, score and position of the new one.

Bytes of a kept token and KV head, D = 128 in 16 bits, G query heads: K and V 4 D = 512; weights
written and read 2 * 2 G; score read and written 8, position 4. G = 4 gives 28 bytes, 5.5 % over
plain decode if all of it went to memory; the weights (2 G bytes a token, 3.4 MB at batch 8, 8 KV
heads, 6.6k kept) normally stay in L2. Weights in 16 bits are within 2^-11 of a probability, where
16-bit keys already move logits by 2^-9.

Arithmetic: 2 matrix products of ROWS = 16 rows per element, one conversion: 2.4 T elements/s at
4.8 TB/s need 77 TFLOP/s of tf32, under a fifth of an H200's. Ceiling: memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import ARCHITECTURES, HOPPER, CompileCase, typed
from measure.kernels._scoring import (
    CHUNK_TILES,
    ScoringWorkspace,
    attend_and_score,
    attend_reference,
    merge_and_score_kernel,
    scoring_split_kernel,
)
from measure.kernels._softmax import replace_token, rows_of, tile_rows, tile_tokens


@triton.jit
def evict_lightest_kernel(
    k, v, n_tokens, keys, values, scores, positions, new_scores, least_scores, least_slots,
    score_unit, position_unit,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
):  # fmt: skip
    """The lightest token of all chunks makes room, per KV head; grid (units)."""
    unit = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, PADDED_CHUNKS)
    live = chunks < CHUNKS
    least = tl.load(least_scores + unit * CHUNKS + chunks, mask=live, other=float("inf"))
    chunk = tl.argmin(least, 0)
    slot = tl.load(least_slots + unit * CHUNKS + chunk).to(tl.int64)
    replace_token(k, v, keys, values, unit, slot, key_batch, key_head, key_token, value_batch,
                  value_head, value_token, HEADS, D, DV)  # fmt: skip
    tl.store(scores + unit * score_unit + slot, tl.load(new_scores + unit))
    position = tl.load(n_tokens).to(positions.dtype.element_ty)
    tl.store(positions + unit * position_unit + slot, position)


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
    out = attend_and_score(q, k, v, keys, values, scores, positions, length, n_tokens, recent,
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
    out, received = attend_reference(q, k, v, keys, values)
    scores += received[..., :-1]
    candidates = scores.masked_fill(positions > n_tokens - recent, torch.inf)
    for index in torch.cartesian_prod(*map(torch.arange, keys.shape[:2])):
        b, head = index.tolist()
        slot = candidates[b, head].argmin()
        keys[b, head, slot], values[b, head, slot] = k[b, head, 0], v[b, head, 0]
        scores[b, head, slot] = received[b, head, -1]
        positions[b, head, slot] = n_tokens
    return out


_STRIDES = "key_batch key_head key_token value_batch value_head value_token"


def _split_case(
    size: int, group: int, architectures: tuple[int, ...] = ARCHITECTURES
) -> CompileCase:
    return CompileCase(
        name=f"scoring split, bf16, head {size}, group {group}",
        kernel=scoring_split_kernel,
        signature=typed(
            {
                "*bf16": "q keys values",
                "*fp16": "weights",
                "*fp32": "tile_tops acc_ptr m_ptr l_ptr",
                "*i64": "length",
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
        architectures=architectures,
    )


def merge_case(name: str, *, heavy: bool) -> CompileCase:
    """The merge as H2O launches it, or (not heavy) TOVA, which hands scores over as positions."""
    positions = "*i32" if heavy else "*fp32"
    return CompileCase(
        name=name,
        kernel=merge_and_score_kernel,
        signature=typed(
            {
                "*bf16": "q k v out",
                "*fp16": "weights",
                "*fp32": "tile_tops acc_ptr m_ptr l_ptr scores new_scores least_scores",
                "*i32": "least_slots",
                "*i64": "length n_tokens",
                "fp32": "scale",
                "i32": "recent capacity score_unit position_unit",
            }
        )
        | {"positions": positions},
        constants={
            "GROUP": 4,
            "ROWS": 16,
            "D": 128,
            "DV": 128,
            "SPLITS": 8,
            "PADDED_SPLITS": 8,
            "BLOCK": 64,
            "CHUNKS": 13,
            "CHUNK_TILES": CHUNK_TILES,
            "HEAVY": heavy,
        },
        architectures=HOPPER,
    )


COMPILE_CASES = (
    _split_case(128, 4),
    _split_case(256, 8, HOPPER),
    merge_case("merge and scores, H2O", heavy=True),
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
        architectures=HOPPER,
    ),
)
