"""A step of StreamingLLM over its ring: turn by place in registers, attend, replace the oldest.

Slots 0..I-1 hold the first tokens, the others a ring of the last W; ``oldest`` of them leaves next.
A query's place is min(t, I + W). Whatever W tokens the ring holds, they are as far from the query
as in the text; only its distance to the first tokens is not the true one.

    turn_keys=False   K was turned at its position before it was cached. The ring needs nothing; the
                      query that meets the first tokens is turned back by t - place.
    turn_keys=True    K is cached as projected (mit-han-lab/streaming-llm). A tile of consecutive
                      places base..base+T-1 is turned by 0..T-1, one table for all tiles, and the
                      query by its distance from ``base``: (R(p - base) q) (R(j) k) is the same.
    positions         "cache": the query's place among the cached. "fixed" (thunlp/InfLLM): first
                      tokens within the window keep their true distance, the others see the query
                      at I + W. The two differ only while I + W > t >= W.

Bytes of a step and KV head: (I + W) (D + DV) b read, (D + DV) b written, nothing copied or moved;
D = DV = 128 in 16 bits and I + W = 1024: 512 KiB. The table is T D 4 bytes, read from L1. Turning
costs two multiply-adds per element of K: 1.2 T elements/s of K at 4.8 TB/s are 2.4 T of the 33 T
lane operations an H200 has. Ceiling: memory bandwidth; a launch takes longer below about 4 MB.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from costmodel.errors import NotApplicableError
from measure.kernels._compile import CompileCase, typed
from measure.kernels._softmax import (
    LOG2_E,
    attend_tile,
    dot_precision,
    merge_unit,
    rows_of,
    store_split,
    tile_rows,
)
from measure.kernels._splits import Partials
from measure.numerics import Rope
from measure.parts import rotate

#: Tokens of a tile.
BLOCK = 32


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
def turn(first, second, angle):
    """Turn pairs (first, second) [rows, PAIRS] by ``angle`` [PAIRS]."""
    cos, sin = cos_sin(angle)
    cos, sin = cos[None, :], sin[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def paired_logits(
    q1, q2, rest, keys, at, seen, cos, sin, PAIRS: tl.constexpr, STEP: tl.constexpr,
    SECOND: tl.constexpr, REST: tl.constexpr, TURN_KEYS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [ROWS, BLOCK] of keys at offsets ``at`` [BLOCK], turned by 0..BLOCK-1 if asked."""
    pair, inner = tl.arange(0, PAIRS), tl.arange(0, BLOCK)
    k1 = tl.load(keys + at[None, :] + (pair * STEP)[:, None], mask=seen[None, :], other=0.0)
    k2 = tl.load(
        keys + at[None, :] + (pair * STEP + SECOND)[:, None], mask=seen[None, :], other=0.0
    )
    k1, k2 = k1.to(tl.float32), k2.to(tl.float32)
    if TURN_KEYS:
        table = pair[:, None] * BLOCK + inner[None, :]
        c, s = tl.load(cos + table), tl.load(sin + table)
        k1, k2 = k1 * c - k2 * s, k2 * c + k1 * s
    logits = tl.dot(q1, k1, input_precision=PRECISION)
    logits = tl.dot(q2, k2, logits, input_precision=PRECISION)
    if REST > 0:
        plain = 2 * PAIRS + tl.arange(0, REST)
        k3 = tl.load(keys + at[None, :] + plain[:, None], mask=seen[None, :], other=0.0)
        logits = tl.dot(rest, k3.to(tl.float32), logits, input_precision=PRECISION)
    return tl.where(seen[None, :], logits, float("-inf"))


@triton.jit
def ring_split_kernel(
    q, keys, values, n_tokens, frequencies, cos, sin, acc_ptr, m_ptr, l_ptr, scale,
    sinks, window, ring_start, key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    STEP: tl.constexpr, SECOND: tl.constexpr, REST: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, TURN_KEYS: tl.constexpr, FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one KV head; grid (units, splits). The first split takes the first tokens."""
    unit, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = unit // HEADS, unit % HEADS
    t = tl.load(n_tokens).to(tl.int32)
    n_sinks = tl.minimum(t, sinks)
    in_ring = tl.minimum(t - n_sinks, window)
    oldest = tl.maximum(t - ring_start, 0) % window
    heads, inner, value_columns = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, DV)
    live, pair = (heads < GROUP)[:, None], tl.arange(0, PAIRS)
    D: tl.constexpr = 2 * PAIRS + REST
    row = q + (unit * GROUP + heads[:, None]) * D
    q1 = tl.load(row + (pair * STEP)[None, :], mask=live, other=0.0).to(tl.float32) * scale
    q2 = tl.load(row + (pair * STEP + SECOND)[None, :], mask=live, other=0.0).to(tl.float32)
    q2 = q2 * scale
    rest = q1
    if REST > 0:
        plain = 2 * PAIRS + tl.arange(0, REST)
        rest = tl.load(row + plain[None, :], mask=live, other=0.0).to(tl.float32) * scale
    frequency = tl.load(frequencies + pair)
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DV), tl.float32)
    if split == 0:
        for first in range(0, n_sinks, BLOCK):
            slot = (first + inner).to(tl.int64)
            seen = slot < n_sinks
            # how far the query has to be turned: from here (keys as projected), or back
            origin = first if TURN_KEYS else t
            place = tl.minimum(t, sinks + window)
            f1, f2 = turn(q1, q2, (place - origin).to(tl.float32) * frequency)
            logits = paired_logits(
                f1, f2, rest, keys, slot * key_token, seen, cos, sin, PAIRS, STEP, SECOND, REST,
                TURN_KEYS, BLOCK, PRECISION,
            )  # fmt: skip
            if FIXED:
                f1, f2 = turn(q1, q2, (sinks + window - origin).to(tl.float32) * frequency)
                far = paired_logits(
                    f1, f2, rest, keys, slot * key_token, seen, cos, sin, PAIRS, STEP, SECOND,
                    REST, TURN_KEYS, BLOCK, PRECISION,
                )  # fmt: skip
                logits = tl.where((t - slot <= window)[None, :], logits, far)
            value = tl.load(
                values + slot[:, None] * value_token + value_columns[None, :],
                mask=seen[:, None],
                other=0.0,
            ).to(tl.float32)
            top, total, out, _ = attend_tile(top, total, out, logits, value, PRECISION)
    tiles = tl.cdiv(tl.cdiv(in_ring, BLOCK), SPLITS)
    stop = tl.minimum((split + 1) * tiles * BLOCK, in_ring)
    for first in range(split * tiles * BLOCK, stop, BLOCK):
        age = first + inner
        seen = age < in_ring
        slot = (n_sinks + (oldest + age) % window).to(tl.int64)
        f1, f2 = q1, q2
        if TURN_KEYS:
            f1, f2 = turn(q1, q2, (in_ring - first).to(tl.float32) * frequency)
        logits = paired_logits(
            f1, f2, rest, keys, slot * key_token, seen, cos, sin, PAIRS, STEP, SECOND, REST,
            TURN_KEYS, BLOCK, PRECISION,
        )  # fmt: skip
        value = tl.load(
            values + slot[:, None] * value_token + value_columns[None, :],
            mask=seen[:, None],
            other=0.0,
        ).to(tl.float32)
        top, total, out, _ = attend_tile(top, total, out, logits, value, PRECISION)
    store_split(acc_ptr, m_ptr, l_ptr, unit, split, top, total, out, GROUP, ROWS, SPLITS, DV)


@triton.jit
def merge_and_replace_kernel(
    q, k, v, keys, values, n_tokens, acc_ptr, m_ptr, l_ptr, out, scale,
    sinks, window, ring_start, key_batch, key_head, key_token, value_batch, value_head, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits and the new token, which takes the oldest one's slot; grid (units)."""
    unit = tl.program_id(0).to(tl.int64)
    merge_unit(q, k, v, acc_ptr, m_ptr, l_ptr, out, unit, scale, GROUP, ROWS, D, DV, SPLITS,
               PADDED_SPLITS)  # fmt: skip
    batch, head = unit // HEADS, unit % HEADS
    t = tl.load(n_tokens).to(tl.int32)
    full = sinks + window
    slot = tl.where(t < full, t, sinks + tl.maximum(t - ring_start, 0) % window).to(tl.int64)
    columns, value_columns = tl.arange(0, D), tl.arange(0, DV)
    at = batch * key_batch + head * key_head + slot * key_token
    tl.store(keys + at + columns, tl.load(k + unit * D + columns))
    at = batch * value_batch + head * value_head + slot * value_token
    tl.store(values + at + value_columns, tl.load(v + unit * DV + value_columns))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RingRope:
    """A rotary embedding as the kernel wants it.

    frequencies  fp32 [pairs], radians per position;  cos, sin  fp32 [pairs, BLOCK] of 0..BLOCK-1
    step, second offsets of pair i's elements: i step, i step + second
    amplitude    of cosine and sine where keys are turned at read
    """

    frequencies: Tensor
    cos: Tensor
    sin: Tensor
    step: int
    second: int
    amplitude: float

    @classmethod
    def make(cls, rope: Rope | None, head_dim: int, device: torch.device) -> "RingRope":
        """Tables of a rotary embedding; None: nothing turns.

        Raises
        ------
        NotApplicableError
            The head does not divide into powers of two of turning and plain elements.
        """
        n = head_dim if rope is None else int(head_dim * rope.fraction)
        pairs, rest = n // 2, head_dim - n
        if pairs < 8 or pairs & (pairs - 1) or (rest and (rest < 8 or rest & (rest - 1))):
            raise NotApplicableError(
                f"the ring kernel turns 16, 32, 64, ... elements of a head, got {n} of {head_dim}"
            )
        if rope is None:
            frequencies = torch.zeros(pairs, device=device)
        else:
            frequencies = rope.frequencies(n, device)
        angles = frequencies[:, None] * torch.arange(BLOCK, device=device)
        interleaved = rope is not None and rope.interleaved
        return cls(
            frequencies=frequencies,
            cos=angles.cos(),
            sin=angles.sin(),
            step=2 if interleaved else 1,
            second=1 if interleaved else pairs,
            amplitude=1.0 if rope is None else rope.amplitude,
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
    turn_keys: bool,
    positions: Literal["cache", "fixed"] = "cache",
) -> Tensor:
    """One step; the new token is written where the next one would have pushed the oldest out.

    Parameters
    ----------
    q, k, v
        The new token: [B, N, 1, D], [B, K, 1, D], [B, K, 1, DV]; q and k as projected with
        ``turn_keys``, else turned at their position.
    keys, values
        Slots [B, K, I + W, D] and [B, K, I + W, DV], rows contiguous.
    n_tokens
        Tokens seen before this one, an integer on the device; slots 0..min(n, I + W)-1 are in use.
    sinks, window
        I and W.
    ring_start
        ``n_tokens`` at which the ring's oldest token was in its first slot, at least I + W.

    Returns
    -------
    Tensor
        [B, N, 1, DV].
    """
    b, n_kv, _, size = keys.shape
    v_size, units, group = values.shape[-1], b * n_kv, q.shape[1] // n_kv
    pairs = len(rope.frequencies)
    if turn_keys and rope.amplitude != 1.0:
        scales = torch.ones(size, device=q.device)
        scales[: 2 * pairs] = rope.amplitude**2
        q = (q * scales).to(q.dtype)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    rows, splits = tile_rows(group), partials.splits
    scale = size**-0.5 * LOG2_E
    parts = (partials.acc, partials.m, partials.l)
    place = (sinks, window, ring_start, *rows_of(keys), *rows_of(values))
    ring_split_kernel[(units, splits)](
        q, keys, values, n_tokens, rope.frequencies, rope.cos, rope.sin, *parts, scale, *place,
        HEADS=n_kv, GROUP=group, ROWS=rows, PAIRS=pairs, STEP=rope.step, SECOND=rope.second,
        REST=size - 2 * pairs, DV=v_size, SPLITS=splits, BLOCK=BLOCK, TURN_KEYS=turn_keys,
        FIXED=positions == "fixed", PRECISION=dot_precision(keys.dtype), num_warps=4,
    )  # fmt: skip
    out = torch.empty(b, q.shape[1], 1, v_size, dtype=q.dtype, device=q.device)
    merge_and_replace_kernel[(units,)](
        q, k, v, keys, values, n_tokens, *parts, out, scale, *place,
        HEADS=n_kv, GROUP=group, ROWS=rows, D=size, DV=v_size, SPLITS=splits,
        PADDED_SPLITS=triton.next_power_of_2(splits), num_warps=4,
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
    positions: Literal["cache", "fixed"] = "cache",
) -> Tensor:
    """The last token of a text over its ring, every kept key turned to its distance, in fp64.

    q [B, N, 1, D] of the last token and k, v [B, K, S, D] of all, as projected; S - 1 were seen.
    """
    t, size = k.shape[2] - 1, k.shape[3]
    kept = [j for j in range(t) if j < sinks or j >= t - window] + [t]
    distances = []
    for j in kept:
        if j >= t - window or t < window:  # the ring, and everything before it is full
            distances.append(t - j)
        elif positions == "fixed":
            distances.append(sinks + window - j)
        else:
            distances.append(min(t, sinks + window) - j)
    frequencies = rope.frequencies(int(size * rope.fraction), k.device).double()
    table = torch.outer(torch.tensor(distances, device=k.device).double(), frequencies)
    cos, sin = (torch.cat((x, y), -1) for x, y in ((table.cos(),) * 2, (-table.sin(), table.sin())))
    queries = q.double().unflatten(1, (k.shape[1], -1)).expand(-1, -1, -1, len(kept), -1)
    turned = rotate(queries.flatten(1, 2), (cos, sin), interleaved=rope.interleaved)
    logits = (turned.unflatten(1, (k.shape[1], -1)) * k[:, :, None, kept].double()).sum(-1)
    weights = (logits * size**-0.5).softmax(-1)
    return (weights @ v[:, :, kept].double()).flatten(1, 2).unsqueeze(2).to(q.dtype)


_STRIDES = "key_batch key_head key_token value_batch value_head value_token"


def _split_case(size: int, *, turn_keys: bool) -> CompileCase:
    name = "keys as projected" if turn_keys else "keys turned before"
    pairs = size // 2
    return CompileCase(
        name=f"ring split, bf16, head {size}, {name}",
        kernel=ring_split_kernel,
        signature=typed(
            {
                "*bf16": "q keys values",
                "*i64": "n_tokens",
                "*fp32": "frequencies cos sin acc_ptr m_ptr l_ptr",
                "fp32": "scale",
                "i32": f"sinks window ring_start {_STRIDES}",
            }
        ),
        constants={
            "HEADS": 8,
            "GROUP": 4,
            "ROWS": 16,
            "PAIRS": pairs,
            "STEP": 1,
            "SECOND": pairs,
            "REST": 0,
            "DV": size,
            "SPLITS": 8,
            "BLOCK": BLOCK,
            "TURN_KEYS": turn_keys,
            "FIXED": False,
            "PRECISION": "tf32",
        },
        aligned=tuple(_STRIDES.split()),
    )


COMPILE_CASES = (
    _split_case(128, turn_keys=False),
    _split_case(128, turn_keys=True),
    _split_case(256, turn_keys=True),
    CompileCase(
        name="merge and replace",
        kernel=merge_and_replace_kernel,
        signature=typed(
            {
                "*bf16": "q k v keys values out",
                "*i64": "n_tokens",
                "*fp32": "acc_ptr m_ptr l_ptr",
                "fp32": "scale",
                "i32": f"sinks window ring_start {_STRIDES}",
            }
        ),
        constants={
            "HEADS": 8,
            "GROUP": 4,
            "ROWS": 16,
            "D": 128,
            "DV": 128,
            "SPLITS": 8,
            "PADDED_SPLITS": 8,
        },
        aligned=tuple(_STRIDES.split()),
    ),
)
