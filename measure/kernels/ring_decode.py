"""A step of StreamingLLM over its full ring: turn in registers, attend, replace the oldest.

Slots 0..I-1 hold the first tokens, the others a ring of the last W; its oldest leaves next. K was
turned at its position before it was cached. Whatever W tokens the ring holds, they are as far from
the query as in the text, so only the query that meets the first tokens turns: back from its
position t to its place I + W. The ring is read slot by slot, in whatever order its tokens lie.

Bytes of a step and KV head: (I + W) (D + DV) b read, (D + DV) b written, nothing copied or moved;
D = DV = 128 in 16 bits and I + W = 1024: 512 KiB. Turning is done once per split, for G queries.
Ceiling: memory bandwidth; a launch takes longer below about 4 MB.
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
from measure.numerics import Rope
from measure.parts import rotate


@triton.jit
def cos_sin(angle):
    """Cosine and sine of up to 1e7 radians, to 1e-6.

    The polynomials and the three-part pi / 2 of Cephes' sinf and cosf; the library's functions keep
    a slow path for huge angles on the stack.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # few bits at a time, so that the products are exact
    many = tl.floor(quarter * (1.0 / 4096.0) + 0.5) * 4096.0
    few = quarter - many
    x = angle - many * 1.5703125 - few * 1.5703125
    x = x - many * 4.837512969970703e-4 - few * 4.837512969970703e-4
    x = x - quarter * 7.549789954891882e-8
    square = x * x
    sin = -1.9515295891e-4 * square + 8.3321608736e-3
    sin = x + x * square * (sin * square - 1.6666654611e-1)
    cos = 2.443315711809948e-5 * square - 1.388731625493765e-3
    cos = 1.0 - 0.5 * square + square * square * (cos * square + 4.166664568298827e-2)
    which = quarter.to(tl.int32) & 3
    swap, minus_cos, minus_sin = (which & 1) == 1, (which == 1) | (which == 2), which >= 2
    turned_cos, turned_sin = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return (
        tl.where(minus_cos, -turned_cos, turned_cos),
        tl.where(minus_sin, -turned_sin, turned_sin),
    )


@triton.jit
def turned_queries(
    q, unit, scale, places, frequencies, TURNING: tl.constexpr, INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Queries [ROWS, D] of one KV head, the first TURNING elements turned by ``places``."""
    heads, columns = tl.arange(0, ROWS), tl.arange(0, D)
    live = (heads < GROUP)[:, None]
    turns = columns < TURNING
    HALF: tl.constexpr = TURNING // 2
    if INTERLEAVED:
        pair, second = columns // 2, columns % 2 == 1
        partner = tl.where(second, columns - 1, columns + 1)
    else:
        pair, second = tl.where(columns < HALF, columns, columns - HALF), columns >= HALF
        partner = tl.where(second, columns - HALF, columns + HALF)
    frequency = tl.load(frequencies + pair, mask=turns, other=0.0)
    cos, sin = cos_sin(places.to(tl.float32) * frequency)
    row = q + (unit * GROUP + heads[:, None]) * D
    mine = tl.load(row + columns[None, :], mask=live, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=live & turns[None, :], other=0.0).to(tl.float32)
    sin = tl.where(second, sin, -sin)
    return (mine * cos[None, :] + other * sin[None, :]) * scale


@triton.jit
def ring_split_kernel(
    q, keys, values, n_tokens, frequencies, acc_ptr, m_ptr, l_ptr, scale, sinks, window, ring_start,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, TURNING: tl.constexpr, INTERLEAVED: tl.constexpr, HIDE_OLDEST: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one KV head; grid (units, splits). The first split takes the first tokens."""
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys += unit // HEADS * key_batch + unit % HEADS * key_head
    values += unit // HEADS * value_batch + unit % HEADS * value_head
    inner = tl.arange(0, BLOCK)
    t = tl.load(n_tokens)
    hidden = sinks + (t - ring_start) % window if HIDE_OLDEST else -1
    top, total, out = nothing_yet(ROWS, DV)
    if split == 0:
        turned = turned_queries(
            q, unit, scale, sinks + window - t, frequencies, TURNING, INTERLEAVED, GROUP, ROWS, D
        )
        for first in range(0, sinks, BLOCK):
            slots = (first + inner).to(tl.int64)
            top, total, out, _ = attend_tokens(
                turned, keys, values, slots, slots < sinks, key_token, value_token, top, total,
                out, PRECISION,
            )  # fmt: skip
    queries = load_queries(q, unit, scale, GROUP, ROWS, D)
    tiles = tl.cdiv(tl.cdiv(window, BLOCK), SPLITS)
    stop = tl.minimum((split + 1) * tiles * BLOCK, window)
    for first in range(split * tiles * BLOCK, stop, BLOCK):
        slots = (sinks + first + inner).to(tl.int64)
        seen = (slots < sinks + window) & (slots != hidden)
        top, total, out, _ = attend_tokens(
            queries, keys, values, slots, seen, key_token, value_token, top, total, out, PRECISION
        )
    store_split(acc_ptr, m_ptr, l_ptr, unit, split, top, total, out, GROUP, ROWS, SPLITS, DV)


@triton.jit
def merge_and_replace_kernel(
    q, k, v, keys, values, n_tokens, acc_ptr, m_ptr, l_ptr, out, scale, sinks, window, ring_start,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits and the new token, which takes the oldest one's slot; grid (units)."""
    unit = tl.program_id(0).to(tl.int64)
    merge_unit(q, k, v, acc_ptr, m_ptr, l_ptr, out, unit, scale, GROUP, ROWS, D, DV, SPLITS,
               PADDED_SPLITS)  # fmt: skip
    slot = sinks + (tl.load(n_tokens) - ring_start) % window
    replace_token(k, v, keys, values, unit, slot, key_batch, key_head, key_token, value_batch,
                  value_head, value_token, HEADS, D, DV)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RingRope:
    """A rotary embedding as the kernel wants it.

    frequencies  fp32 [pairs], radians per position
    interleaved  whether the pairs are neighbours; else pair i is (i, i + pairs)
    """

    frequencies: Tensor
    interleaved: bool

    @classmethod
    def make(cls, rope: Rope | None, head_dim: int, device: torch.device) -> "RingRope":
        """Of a rotary embedding; None: nothing turns."""
        if rope is None:
            return cls(frequencies=torch.empty(0, device=device), interleaved=False)
        turning = int(head_dim * rope.fraction)
        return cls(
            frequencies=rope.frequencies(turning, device).float(), interleaved=rope.interleaved
        )


def ring_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    n_tokens: Tensor,
    sinks: int,
    window: int,
    ring_start: int,
    rope: RingRope,
    partials: Partials,
    hide_oldest: bool = False,
) -> Tensor:
    """One step; the new token takes the slot of the ring's oldest.

    Parameters
    ----------
    q, k, v
        The new token: [B, N, 1, D], [B, K, 1, D], [B, K, 1, DV]; q and k turned at its position.
    keys, values
        Slots [B, K, I + W, D] and [B, K, I + W, DV], all in use, rows contiguous.
    n_tokens
        Tokens seen before this one, an integer on the device.
    sinks, window
        I and W.
    ring_start
        ``n_tokens`` at which the ring's oldest token was in its first slot.
    hide_oldest
        Whether the window of W counts the new token, so that the oldest cached is not seen.

    Returns
    -------
    Tensor
        [B, N, 1, DV].
    """
    b, n_kv, _, size = keys.shape
    v_size, units, group = values.shape[-1], b * n_kv, q.shape[1] // n_kv
    check_heads(q.shape[1], n_kv, size, v_size)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    scale = size**-0.5 * LOG2_E
    parts = (partials.acc, partials.m, partials.l)
    # A replayed step may count fewer tokens than where a later turn of the ring began.
    place = (sinks, window, ring_start % window, *rows_of(keys), *rows_of(values))
    shape = {"HEADS": n_kv, "GROUP": group, "ROWS": tile_rows(group), "D": size, "DV": v_size,
             "SPLITS": partials.splits, "num_warps": 4}  # fmt: skip
    ring_split_kernel[(units, partials.splits)](
        q, keys, values, n_tokens, rope.frequencies, *parts, scale, *place,
        TURNING=2 * len(rope.frequencies), INTERLEAVED=rope.interleaved, HIDE_OLDEST=hide_oldest,
        BLOCK=tile_tokens(max(size, v_size)), PRECISION=dot_precision(keys.dtype), **shape,
    )  # fmt: skip
    out = torch.empty(b, q.shape[1], 1, v_size, dtype=q.dtype, device=q.device)
    merge_and_replace_kernel[(units,)](
        q, k, v, keys, values, n_tokens, *parts, out, scale, *place,
        PADDED_SPLITS=triton.next_power_of_2(partials.splits), **shape,
    )  # fmt: skip
    return out


def ring_decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: int,
    window: int,
    rope: Rope,
    hide_oldest: bool = False,
) -> Tensor:
    """The last token of a text over its full ring, every kept key turned to its place, in fp64.

    q [B, N, 1, D] of the last token and k, v [B, K, S, D] of all, not turned; S - 1 were seen.
    """
    t, size = k.shape[2] - 1, k.shape[3]
    kept = [*range(sinks), *range(t - window + hide_oldest, t + 1)]
    distances = [sinks + window - j if j < sinks else t - j for j in kept]
    frequencies = rope.frequencies(int(size * rope.fraction), k.device).double()
    table = torch.outer(torch.tensor(distances, device=k.device).double(), frequencies)
    cos, sin = (torch.cat((x, y), -1) for x, y in ((table.cos(),) * 2, (-table.sin(), table.sin())))
    queries = q.double().unflatten(1, (k.shape[1], -1)).expand(-1, -1, -1, len(kept), -1)
    turned = rotate(queries.flatten(1, 2), (cos, sin), interleaved=rope.interleaved)
    logits = (turned.unflatten(1, (k.shape[1], -1)) * k[:, :, None, kept].double()).sum(-1)
    weights = (logits * size**-0.5).softmax(-1)
    return (weights @ v[:, :, kept].double()).flatten(1, 2).unsqueeze(2).to(q.dtype)


_STRIDES = "key_batch key_head key_token value_batch value_head value_token"


def _cases(size: int) -> tuple[CompileCase, ...]:
    shape = {"HEADS": 8, "GROUP": 4, "ROWS": 16, "D": size, "DV": size, "SPLITS": 8}
    common = {
        "*bf16": "q keys values",
        "*i64": "n_tokens",
        "*fp32": "acc_ptr m_ptr l_ptr",
        "fp32": "scale",
        "i32": f"sinks window ring_start {_STRIDES}",
    }
    turning = {"TURNING": size, "INTERLEAVED": False, "HIDE_OLDEST": False}
    return (
        CompileCase(
            name=f"ring split, bf16, head {size}",
            kernel=ring_split_kernel,
            signature=typed(common) | {"frequencies": "*fp32"},
            constants={**shape, **turning, "BLOCK": tile_tokens(size), "PRECISION": "tf32"},
            aligned=tuple(_STRIDES.split()),
        ),
        CompileCase(
            name=f"merge and replace, bf16, head {size}",
            kernel=merge_and_replace_kernel,
            signature=typed(common) | typed({"*bf16": "k v out"}),
            constants={**shape, "PADDED_SPLITS": 8},
            aligned=tuple(_STRIDES.split()),
            architectures=HOPPER,
        ),
    )


COMPILE_CASES = _cases(128)
