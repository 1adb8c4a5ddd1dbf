"""Decode attention over a KIVI cache: packed blocks, residual and new token in one launch.

Keys lie in blocks of R tokens, [H, R bits / 16] words per block with a scale and a zero point per
channel and ``group`` tokens; values lie token by token, [H bits / 16] words each with a scale and a
zero point per ``group`` channels; the last T mod R keys and R values in 16 bits, the values in a
ring. One program is one warp: one split of one KV head's blocks, all its G query heads together.

    keys     a s = (q scale) is the second operand, x = 1 + code / 2^e the first (``_unpack``):
             score[t, g] = 2^e ( x . (q scale) - sum q scale ) + sum q zero,   per token group
    values   out[h, g] = 2^e ( x . (p scale) - sum p scale ) + sum p zero,     per channel group

The second operands hold all groups side by side (columns g x group), so that one matrix product
serves the whole block; the columns of other groups are dropped. The program behind the splits takes
the block whose oldest values are packed already and whose latest are still in the ring, the last
program the residual keys and the new token. ``merge_splits`` adds everything up.

Bytes, each read once, for T cached tokens, b-byte scales, e = bits/8 + 2 b/group per element:
    B K H [ Nk e + (T - Nk) b + Nv e + (T - Nv) b ],  Nk = T - T mod R,  Nv = max(0, T - R)
plus q, the new token and the partial results.

Ceiling. At bits=2, group=32, bf16: 3 bits per element, so 4.8e12 B/s (H200) bring 12.8e12
elements/s. Per element 0.75 (2 bits) or 0.875 (4 bits) integer instructions on a pipe of 64 lanes
(132 SMs at 1.755 GHz: 14.8e12/s), 0.25 tensor instructions of 128 elements each; the whole loop
takes about 2.4 instructions per element (2,471 of a warp for the 32,768 of a block, counted in the
compiled loop) against 29.6e12/s issued: 12.3e12 elements/s. Memory and issue bind alike. At 4 bits
(5 bits per element, 7.7e12 elements/s) memory binds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import CompileCase
from measure.kernels._packed import packed_product, packed_values, store_sums
from measure.kernels._splits import Partials
from measure.kernels._tiles import dot_type, log2_scale, padded_group, warps_for
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


@triton.jit
def _scores(
    words_ptr, scale_ptr, zero_ptr, q,
    BITS: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Scores of a block of keys in units of log2: [words, GP] for each code of a word."""
    H: tl.constexpr = q.shape[0]
    GP: tl.constexpr = q.shape[1]
    W: tl.constexpr = R * BITS // 16
    TG: tl.constexpr = R // GROUP
    h = tl.arange(0, H)
    words = tl.load(words_ptr + tl.arange(0, W)[:, None] + h[None, :] * W)
    at = h[:, None] * TG + tl.arange(0, TG)[None, :]
    scale = tl.load(scale_ptr + at).to(tl.float32).to(DTYPE)
    zero = tl.load(zero_ptr + at).to(tl.float32).to(DTYPE)
    return packed_product(words, q, scale, zero, BITS, GP, GROUP, DTYPE, ASM)


@triton.jit
def _softmax(scores, m, l, CODES: tl.constexpr, DTYPE: tl.constexpr):
    """Probabilities [tokens, GP] of a block against the new maximum, and what the old ones lose."""
    top = scores[0]
    for j in tl.static_range(1, CODES):
        top = tl.maximum(top, scores[j])
    largest = tl.maximum(m, tl.max(top, 0))
    alpha = tl.exp2(m - largest)
    total = tl.zeros_like(top)
    p = ()
    for j in tl.static_range(CODES):
        e = tl.exp2(scores[j] - largest[None, :])
        total += e
        p = p + (e.to(DTYPE),)
    W: tl.constexpr = top.shape[0]
    GP: tl.constexpr = top.shape[1]
    # Token w x CODES + j: the bits of j, the highest first, follow w.
    if CODES == 8:
        even = tl.join(tl.join(p[0], p[4]), tl.join(p[2], p[6]))
        odd = tl.join(tl.join(p[1], p[5]), tl.join(p[3], p[7]))
        ordered = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    else:
        ordered = tl.permute(tl.join(tl.join(p[0], p[2]), tl.join(p[1], p[3])), (0, 2, 3, 1))
    return tl.reshape(ordered, (W * CODES, GP)), largest, l * alpha + tl.sum(total, 0), alpha


@triton.jit(do_not_specialize=COUNTS)
def _kernel(
    q_ptr, k_new_ptr, v_new_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, rk_ptr, rv_ptr,
    length_ptr, acc_ptr, m_ptr, l_ptr,
    key_capacity, value_capacity, recent_capacity, ring_start, n_splits, n_kv_heads, log2_scale,
    BITS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 16 // BITS
    KW: tl.constexpr = H * (R // CODES)
    KG: tl.constexpr = H * (R // GROUP)
    VW: tl.constexpr = H // CODES
    VG: tl.constexpr = H // GROUP
    unit = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(length_ptr + unit // n_kv_heads)
    g = tl.arange(0, GP)
    h = tl.arange(0, H)
    real = g < G
    q = tl.load(q_ptr + (unit * G + g[None, :]) * H + h[:, None], mask=real[None, :], other=0.0)
    q = (q.to(tl.float32) * log2_scale).to(DTYPE)
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)
    rows = (unit * G + g) * (n_splits + 3) + split

    n_values = tl.maximum(length - R, 0)
    whole = n_values // R
    key_block = unit * key_capacity
    value_token = unit * value_capacity

    if split < n_splits:
        share = (whole + n_splits - 1) // n_splits
        first = split * share
        last = tl.minimum(first + share, whole)
        out = ()
        for j in tl.static_range(CODES):
            out = out + (tl.zeros((VW, GP), tl.float32),)
        for block in range(first, last):
            at = key_block + block
            scores = _scores(
                kw_ptr + at * KW, ks_ptr + at * KG, kz_ptr + at * KG, q, BITS, R, GROUP, DTYPE, ASM
            )
            p, m, l, alpha = _softmax(scores, m, l, CODES, DTYPE)
            token = value_token + block * R
            added = packed_values(
                vw_ptr + token * VW, vs_ptr + token * VG, vz_ptr + token * VG, p, R,
                BITS, H, GROUP, DTYPE, ASM,
            )  # fmt: skip
            kept = ()
            for j in tl.static_range(CODES):
                kept = kept + (out[j] * alpha[None, :] + added[j],)
            out = kept
        store_sums(out, acc_ptr, rows, real, H)
        tl.store(m_ptr + rows, m, mask=real)
        tl.store(l_ptr + rows, l, mask=real)
    elif split == n_splits:
        if length >= R:
            # Keys packed; the values before ``n_values`` too, the others in the ring.
            at = key_block + whole
            scores = _scores(
                kw_ptr + at * KW, ks_ptr + at * KG, kz_ptr + at * KG, q, BITS, R, GROUP, DTYPE, ASM
            )
            p, m, l, alpha = _softmax(scores, m, l, CODES, DTYPE)
            t = tl.arange(0, R)
            n_packed = (n_values - whole * R).to(tl.int32)
            in_ring = t >= n_packed
            token = value_token + whole * R
            packed = tl.where(in_ring[:, None], 0.0, p)
            out = packed_values(
                vw_ptr + token * VW, vs_ptr + token * VG, vz_ptr + token * VG, packed, n_packed,
                BITS, H, GROUP, DTYPE, ASM,
            )  # fmt: skip
            store_sums(out, acc_ptr, rows, real, H)
            tl.store(m_ptr + rows, m, mask=real)
            tl.store(l_ptr + rows, tl.sum(packed.to(tl.float32), 0), mask=real)
            ringed = tl.where(in_ring[:, None], p, 0.0)
            slot = ((whole * R + t + R - ring_start) % R).to(tl.int64)
            for start in tl.static_range(0, H, CHUNK):
                part = start + tl.arange(0, CHUNK)
                ptr = rv_ptr + (unit * recent_capacity + slot[None, :]) * H + part[:, None]
                v = tl.load(ptr, mask=in_ring[None, :], other=0.0).to(tl.float32).to(DTYPE)
                value = tl.dot(v, ringed, input_precision="ieee")
                tl.store(
                    acc_ptr + (rows[None, :] + 1) * H + part[:, None], value, mask=real[None, :]
                )
            tl.store(m_ptr + rows + 1, m, mask=real)
            tl.store(l_ptr + rows + 1, tl.sum(ringed.to(tl.float32), 0), mask=real)
        else:
            for part in tl.static_range(2):
                tl.store(m_ptr + rows + part, m, mask=real)
                tl.store(l_ptr + rows + part, l, mask=real)
    else:
        # Residual keys with ring values, and the new token behind them.
        begin = length // R * R
        n_recent = (length - begin).to(tl.int32)
        acc = tl.zeros((H, GP), tl.float32)
        for start in tl.range(0, n_recent + 1, CHUNK, num_stages=1):
            i = start + tl.arange(0, CHUNK)
            old = i < n_recent
            k = tl.load(
                rk_ptr + (unit * recent_capacity + i[:, None]) * H + h[None, :],
                mask=old[:, None],
                other=0.0,
            )
            newest = i == n_recent
            k += tl.load(k_new_ptr + unit * H + h[None, :] + 0 * i[:, None], mask=newest[:, None],
                         other=0.0)  # fmt: skip
            s = tl.dot(k.to(tl.float32).to(DTYPE), q, input_precision="ieee")
            s = tl.where((i <= n_recent)[:, None], s, float("-inf"))
            largest = tl.maximum(m, tl.max(s, 0))
            alpha = tl.exp2(m - largest)
            m = largest
            p = tl.exp2(s - m[None, :])
            l = l * alpha + tl.sum(p, 0)
            slot = ((begin + i + R - ring_start) % R).to(tl.int64)
            v = tl.load(
                rv_ptr + (unit * recent_capacity + slot[None, :]) * H + h[:, None],
                mask=old[None, :],
                other=0.0,
            )
            v += tl.load(v_new_ptr + unit * H + h[:, None] + 0 * i[None, :], mask=newest[None, :],
                         other=0.0)  # fmt: skip
            v = v.to(tl.float32).to(DTYPE)
            acc = tl.dot(v, p.to(DTYPE), acc * alpha[None, :], input_precision="ieee")
        rows += 1
        tl.store(acc_ptr + rows[None, :] * H + h[:, None], acc, mask=real[None, :])
        tl.store(m_ptr + rows, m, mask=real)
        tl.store(l_ptr + rows, l, mask=real)


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
    gp = padded_group(n // n_kv, max(1, 8 * group // min(h, residual)))
    _kernel[(b * n_kv, n_splits + 2)](
        q, k_new, v_new,
        keys[0].view(torch.int16), keys[1], keys[2],
        values[0].view(torch.int16), values[1], values[2],
        recent_keys, recent_values, lengths, partials.acc, partials.m, partials.l,
        keys[0].shape[2], values[0].shape[2], recent_keys.shape[2], ring_start, n_splits, n_kv,
        log2_scale(h),
        BITS=bits, H=h, R=residual, GROUP=group, G=n // n_kv, GP=gp, CHUNK=min(32, residual),
        DTYPE=dtype, ASM=asm, num_warps=warps_for(h), num_stages=2,
    )  # fmt: skip
    return merge_splits(partials, torch.empty_like(q))


def _case(bits: int, size: int, group: int) -> CompileCase:
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
            "GP": padded_group(group, 32 * 8 // min(size, 128)),
            "CHUNK": 32,
            "DTYPE": tl.float16,
            "ASM": True,
        },
        num_warps=warps_for(size),
        num_stages=2,
        max_spilled_bytes=192,
    )


COMPILE_CASES = (_case(2, 128, 4),)
