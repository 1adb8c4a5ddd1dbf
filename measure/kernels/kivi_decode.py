"""Decode attention over a KIVI cache: packed blocks, residual and new token in one launch.

Keys lie in blocks of R tokens, [H, R bits / 16] words per block with a scale and a zero point per
channel and ``group`` tokens; values lie token by token, [H bits / 16] words each with a scale and a
zero point per ``group`` channels; the last T mod R keys and R values in 16 bits, the values in a
ring. One program is one warp: one split of one KV head's blocks, all its G query heads together.

    keys     a s = (q scale) is the second operand, x = 1 + code / 2^e the first (``_unpack``):
             score[t, g] = 2^e ( x . (q scale) - sum q scale ) + sum q zero,   per token group
    values   out[h, g] = 2^e ( x . (p scale) - sum p scale ) + sum p zero,     per channel group

Packed rows are taken in tiles of 16 words: 128 tokens or channels of 2 bits, 64 of 4. The second
operands hold a tile's groups side by side (columns g x group), so that one matrix product serves
them all; the columns of other groups are dropped. The program behind the splits takes
the block whose oldest values are packed already and whose latest are still in the ring, the last
program the residual keys and the new token. ``merge_splits`` adds everything up.

Bytes, each read once, for T cached tokens, b-byte scales, e = bits/8 + 2 b/group per element:
    B K H [ Nk e + (T - Nk) b + Nv e + (T - Nv) b ],  Nk = T - T mod R,  Nv = max(0, T - R)
plus q, the new token and the partial results.

Ceiling. At bits=2, group=32, bf16: 3 bits per element, so 4.8e12 B/s (H200) bring 12.8e12
elements/s. Per element 0.75 (2 bits) or 0.875 (4 bits) integer instructions on a pipe of 64 lanes
(132 SMs at 1.755 GHz: 14.8e12/s). A pass of the compiled loop has 2,463 instructions of a warp for
the 32,768 elements of a block, 2.4 each, against 29.6e12/s issued: 12.3e12 elements/s. Memory and
issue bind alike. 320 of them are tensor instructions of 2,048 multiply-adds: 4 cycles each at the
peak rate, 6.4 at the 63 % that mma.sync reaches on Hopper (arXiv 2402.13499), 2,050 of the 2,463
cycles; with more than 4 query heads a KV head these double, and bind. At 4 bits (5 bits per
element, 7.7e12 elements/s) memory binds.

A program has all 255 registers: what is spilled lies outside the loop, but for some values that are
stored before it and read once a pass (the table counts them).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import ARCHITECTURES, HOPPER, CompileCase
from measure.kernels._kivi import attend_mixed, attend_packed, attend_recent
from measure.kernels._packed import TILE_WORDS, groups_of
from measure.kernels._splits import Partials
from measure.kernels._tiles import dot_type, log2_scale, padded_group
from measure.kernels.merge_splits import merge_splits
from measure.methods.packing import dequantise

#: Arguments that change from case to case: a kernel each would take seconds to compile, and none
#: would be faster, as every offset is a multiple of a head.
COUNTS = (
    *("key_capacity", "value_capacity", "recent_capacity"),
    *("ring_start", "n_splits", "n_kv_heads"),
)
#: Partial results behind the splits: packed and ring values of the mixed block, and the residual.
EXTRA_PARTS = 3


def reference(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor],
    recent_keys: Tensor,
    recent_values: Tensor,
    *,
    bits: int,
    group: int,
    n_tokens: int,
    ring_start: int,
) -> Tensor:
    """Unpack everything in fp32, put it in order and attend; [B, N, 1, H]."""
    r = recent_keys.shape[2]
    n_blocks, n_packed = n_tokens // r, max(0, n_tokens - r)
    words, scale, zero = keys
    parts = (words[:, :, :n_blocks], scale[:, :, :n_blocks].float(), zero[:, :, :n_blocks].float())
    k = dequantise(*parts, bits, group).transpose(-1, -2).flatten(2, 3)
    k = torch.cat((k, recent_keys[:, :, : n_tokens - n_blocks * r].float(), k_new.float()), 2)
    words, scale, zero = (x[:, :, :n_packed] for x in values)
    v = dequantise(words, scale.float(), zero.float(), bits, group)
    slots = torch.arange(n_packed, n_tokens, device=q.device).sub(ring_start).remainder(r)
    v = torch.cat((v, recent_values[:, :, slots].float(), v_new.float()), 2)
    queries = q.float().reshape(len(q), k.shape[1], -1, q.shape[-1])
    weights = (queries @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).reshape(q.shape)


@triton.jit(do_not_specialize=COUNTS)
def _kernel(
    q_ptr, k_new_ptr, v_new_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, rk_ptr, rv_ptr,
    length_ptr, acc_ptr, m_ptr, l_ptr,
    key_capacity, value_capacity, recent_capacity, ring_start, n_splits, n_kv_heads, log2_scale,
    BITS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    HC: tl.constexpr = min(H, 128)
    unit = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(length_ptr + unit // n_kv_heads)
    g = tl.arange(0, GP)
    real = g < G
    q = ()
    for c in tl.static_range(H // HC):
        at = (unit * G + g[None, :]) * H + (tl.arange(0, HC) + c * HC)[:, None]
        queries = tl.load(q_ptr + at, mask=real[None, :], other=0.0).to(tl.float32)
        q = q + ((queries * log2_scale).to(DTYPE),)
    rows = (unit * G + g) * (n_splits + 3) + split
    n_values = tl.maximum(length - R, 0)
    whole = n_values // R
    block = unit * key_capacity
    kw_ptr += block * (H * R * BITS // 16)
    ks_ptr += block * (H * R // GROUP)
    kz_ptr += block * (H * R // GROUP)
    token = unit * value_capacity
    vw_ptr += token * (H * BITS // 16)
    vs_ptr += token * (H // GROUP)
    vz_ptr += token * (H // GROUP)
    recent = unit * recent_capacity * H
    if split < n_splits:
        tiles = whole * (R // TILE)
        share = (tiles + n_splits - 1) // n_splits
        first = split * share
        attend_packed(
            kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, acc_ptr, m_ptr, l_ptr, q, rows, real,
            first, tl.minimum(first + share, tiles), BITS, H, R, TILE, GROUP, DTYPE, ASM,
        )  # fmt: skip
    elif split == n_splits:
        n_tiles = tl.where(length >= R, R // TILE, 0)
        attend_mixed(
            kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, rv_ptr + recent, acc_ptr, m_ptr, l_ptr,
            q, rows, real, whole, n_values, n_tiles, ring_start,
            BITS, H, R, TILE, GROUP, CHUNK, DTYPE, ASM,
        )  # fmt: skip
    else:
        attend_recent(
            k_new_ptr + unit * H, v_new_ptr + unit * H, rk_ptr + recent, rv_ptr + recent,
            acc_ptr, m_ptr, l_ptr, q, rows + 1, real, length, ring_start, H, R, CHUNK, DTYPE,
        )  # fmt: skip


def _tile(bits: int, residual: int) -> int:
    """Tokens that the packed tiles of keys hold."""
    return min(residual, TILE_WORDS.value * 16 // bits)


def _chunk(size: int, tile: int) -> int:
    """Tokens, or channels, of 16-bit tiles: 8 KiB or less."""
    return min(32, 4096 // size, tile)


def _least_queries(bits: int, group: int, tile: int) -> int:
    """Query heads with which a tensor instruction's 8 columns are full."""
    return max(1, 8 // groups_of(tile, group))


def kivi_decode(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor],
    recent_keys: Tensor,
    recent_values: Tensor,
    lengths: Tensor,
    partials: Partials,
    *,
    bits: int,
    group: int,
    residual: int,
    ring_start: int,
) -> Tensor:
    """Attend one new token over the cache and itself; nothing is changed. [B, N, 1, H].

    Parameters
    ----------
    q, k_new, v_new
        [B, N, 1, H] and [B, K, 1, H], contiguous.
    keys, values
        Words, scales, zero points with their whole room: [B, K, blocks, H, R bits / 32] int32 and
        [B, K, blocks, H, R / group]; [B, K, tokens, H bits / 32] and [B, K, tokens, H / group].
    recent_keys, recent_values
        [B, K, room, H]; room is R, or less where the sequence never gets there.
    lengths
        Tokens cached, [B] int64 on the device.
    partials
        Room for B N rows and the splits + ``EXTRA_PARTS``.
    ring_start
        Slot t - ring_start mod R of the value ring holds token t.
    """
    b, n, _, h = q.shape
    n_kv = k_new.shape[1]
    n_splits = partials.splits - EXTRA_PARTS
    dtype, asm = dot_type(q.dtype)
    tile = _tile(bits, residual)
    gp = padded_group(n // n_kv, _least_queries(bits, group, tile))
    _kernel[(b * n_kv, n_splits + 2)](
        q, k_new, v_new,
        keys[0].view(torch.int16), keys[1], keys[2],
        values[0].view(torch.int16), values[1], values[2],
        recent_keys, recent_values, lengths, partials.acc, partials.m, partials.l,
        keys[0].shape[2], values[0].shape[2], recent_keys.shape[2], ring_start, n_splits, n_kv,
        log2_scale(h),
        BITS=bits, H=h, R=residual, GROUP=group, G=n // n_kv, GP=gp, TILE=tile,
        CHUNK=_chunk(h, tile), DTYPE=dtype, ASM=asm, num_warps=1, num_stages=2,
    )  # fmt: skip
    return merge_splits(partials, torch.empty_like(q))


def _case(
    bits: int,
    size: int,
    group: int,
    *,
    architectures: tuple[int, ...] = HOPPER,
    max_loop_spills: int = 0,
    tested: bool = False,
) -> CompileCase:
    words = ("kw_ptr", "vw_ptr")
    floats = ("q_ptr", "k_new_ptr", "v_new_ptr", "ks_ptr", "kz_ptr", "vs_ptr", "vz_ptr")
    return CompileCase(
        name=f"KIVI-{bits}, H {size}, {group} query heads a KV head",
        kernel=_kernel,
        signature={
            **dict.fromkeys(words, "*i16"),
            **dict.fromkeys((*floats, "rk_ptr", "rv_ptr"), "*bf16"),
            **dict.fromkeys(("acc_ptr", "m_ptr", "l_ptr"), "*fp32"),
            "length_ptr": "*i64",
            **dict.fromkeys(COUNTS, "i32"),
            "log2_scale": "fp32",
        },
        constants={
            "BITS": bits,
            "H": size,
            "R": 128,
            "GROUP": 32,
            "G": group,
            "GP": padded_group(group, _least_queries(bits, 32, _tile(bits, 128))),
            "TILE": _tile(bits, 128),
            "CHUNK": _chunk(size, _tile(bits, 128)),
            "DTYPE": tl.float16,
            "ASM": True,
        },
        num_warps=1,
        num_stages=2,
        first_loop=True,
        max_loop_spills=max_loop_spills,
        architectures=architectures,
        tested=tested,
    )


COMPILE_CASES = (
    _case(2, 128, 4, architectures=ARCHITECTURES, max_loop_spills=16, tested=True),
    _case(4, 128, 4),
    _case(4, 256, 4),
    _case(2, 64, 4),
    _case(2, 256, 4, max_loop_spills=300),
    _case(2, 128, 8, max_loop_spills=300),
)
