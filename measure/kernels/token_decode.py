"""Decode attention over caches whose entries are tokens: 16-bit, FP8, and FlexGen's packed groups.

One program is one warp: one split of one KV head's tokens, all its G query heads together; the
program behind the splits takes the new token, and ``merge_splits`` adds everything up.

    16 bits   score = k . q,  out = sum p v, on tensor cores with the cache as first operand
    8 bits    e4m3 bytes become halves times 2^-8 (``_unpack``); 2^8 and the layer's scale ride on q
              and on the merged values
    2, 4      x = 1 + code / 2^e; the second operand has q's channel groups as columns, g x group:
              score = sum over groups of scale ( x . (2^e q) - sum 2^e q ) + zero sum q
              and the values as in ``kivi_decode``

Bytes, each read once, for T cached tokens: 2 B K T H e, with e = 2, 1 or bits/8 + 2 b/group bytes
per element, plus q, the new token and the partial results.

Ceiling. 16 and 8 bits: memory (8 bits: 7 integer instructions for the 4 bytes of a register, so
4.8e12 elements/s on an H200 need 8.4e12 of 14.8e12 instructions/s; 2.8 instructions of any kind per
element need 13.2e12 of 29.6e12). FlexGen-4 with groups of 64 and bf16 scales: 4.5 bits per element,
8.5e12 elements/s need 7.5e12 integer instructions/s and, at 2.3, 20e12 in all: memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels import interpreted
from measure.kernels._compile import ARCHITECTURES, HOPPER, CompileCase
from measure.kernels._packed import no_values, packed_values, rescaled_sum, store_sums
from measure.kernels._splits import Partials
from measure.kernels._tiles import dot_type, log2_scale, padded_group, warps_for
from measure.kernels._unpack import e4m3_halves, fractions, scale_of
from measure.kernels.merge_splits import merge_splits
from measure.methods.packing import dequantise

#: The partial result behind the splits: the new token.
EXTRA_PARTS = 1
#: Tokens of a step of the loop, by bits: 8 KiB of keys or less.
BLOCK_TOKENS = {16: 32, 8: 64, 4: 64, 2: 128}
#: Log2 of what e4m3 bytes lack when their bits are read as a half's.
_E4M3_LOG2 = 8


def reference(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    *,
    bits: int,
    group: int = 0,
    n_tokens: int,
) -> Tensor:
    """Widen everything to fp32 and attend; [B, N, 1, H]."""

    def widened(parts: tuple[Tensor, ...]) -> Tensor:
        if bits == 16:
            return parts[0][:, :, :n_tokens].float()
        if bits == 8:
            return parts[0][:, :, :n_tokens].float() * parts[1].float()
        codes, scale, zero = (x[:, :, :n_tokens] for x in parts)
        return dequantise(codes, scale.float(), zero.float(), bits, group)

    k = torch.cat((widened(keys), k_new.float()), 2)
    v = torch.cat((widened(values), v_new.float()), 2)
    queries = q.float().reshape(len(q), k.shape[1], -1, q.shape[-1])
    weights = (queries @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).reshape(q.shape)


@triton.jit
def _elements(words, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Element J of every word as the number that is multiplied."""
    if BITS == 16:
        return words if words.dtype == DTYPE else words.to(tl.float32).to(DTYPE)
    elif BITS == 8:
        return e4m3_halves(words, J, DTYPE, ASM)
    else:
        return fractions(words, BITS, J, DTYPE, ASM)


@triton.jit(do_not_specialize=("capacity", "n_splits", "n_kv_heads"))
def _kernel(
    q_ptr, k_new_ptr, v_new_ptr, k_ptr, ks_ptr, kz_ptr, v_ptr, vs_ptr, vz_ptr,
    length_ptr, acc_ptr, m_ptr, l_ptr,
    capacity, n_splits, n_kv_heads, log2_scale,
    BITS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 16 // BITS
    W: tl.constexpr = H // CODES
    HG: tl.constexpr = H // GROUP if BITS < 8 else 1
    N: tl.constexpr = GP * HG
    unit = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(length_ptr + unit // n_kv_heads)
    g = tl.arange(0, GP)
    real = g < G
    rows = (unit * G + g) * (n_splits + 1) + split
    if split < n_splits:
        w = tl.arange(0, W)
        n = tl.arange(0, N)
        # Queries of the j-th element of every word, and what the 1 of a fraction adds to a score.
        queries = ()
        taken = tl.zeros((N,), tl.float32)
        plain = tl.zeros((N,), tl.float32)
        for j in tl.static_range(CODES):
            place = (unit * G + n[None, :] // HG) * H + w[:, None] * CODES + j
            q = tl.load(q_ptr + place, mask=(n[None, :] // HG) < G, other=0.0).to(tl.float32)
            q *= log2_scale
            if BITS < 8:
                q = tl.where((w[:, None] * CODES // GROUP) == (n[None, :] % HG), q, 0.0)
                plain += tl.sum(q, 0)
                q = (q * scale_of(BITS, j)).to(DTYPE)
                taken += tl.sum(q.to(tl.float32), 0)
            elif BITS == 8:
                q = (q * (tl.load(ks_ptr) * 256.0)).to(DTYPE)
            else:
                q = q.to(DTYPE)
            queries = queries + (q,)
        m = tl.full((GP,), float("-inf"), tl.float32)
        l = tl.zeros((GP,), tl.float32)
        out = ()
        if BITS < 8:
            out = no_values(BITS, H, GP)
        else:
            for j in tl.static_range(CODES):
                out = out + (tl.zeros((W, GP), tl.float32),)
        blocks = (length + BLOCK - 1) // BLOCK
        share = (blocks + n_splits - 1) // n_splits
        first = split * share
        last = tl.minimum(first + share, blocks)
        for block in range(first, last):
            begin = unit * capacity + block * BLOCK
            i = tl.arange(0, BLOCK)
            n_valid = tl.minimum(length - block * BLOCK, BLOCK).to(tl.int32)
            seen = i < n_valid
            words = tl.load(
                k_ptr + begin * W + i[:, None] * W + w[None, :], mask=seen[:, None], other=0
            )
            score = tl.zeros((BLOCK, N), tl.float32) - taken[None, :]
            for j in tl.static_range(CODES):
                x = _elements(words, BITS, j, DTYPE, ASM)
                score = tl.dot(x, queries[j], score, input_precision="ieee")
            if BITS < 8:
                entry = begin * HG + i[:, None] * HG + tl.arange(0, HG)[None, :]
                scale = tl.load(ks_ptr + entry, mask=seen[:, None], other=0.0).to(tl.float32)
                zero = tl.load(kz_ptr + entry, mask=seen[:, None], other=0.0).to(tl.float32)
                parts = tl.reshape(score, (BLOCK, GP, HG)) * scale[:, None, :]
                parts += tl.reshape(plain, (GP, HG))[None, :, :] * zero[:, None, :]
                s = tl.sum(parts, 2)
            else:
                s = score
            s = tl.where(seen[:, None], s, float("-inf"))
            largest = tl.maximum(m, tl.max(s, 0))
            alpha = tl.exp2(m - largest)
            m = largest
            e = tl.exp2(s - m[None, :])
            l = l * alpha + tl.sum(e, 0)
            p = e.to(DTYPE)
            if BITS < 8:
                added = packed_values(
                    v_ptr + begin * W, vs_ptr + begin * HG, vz_ptr + begin * HG, p, n_valid,
                    BITS, H, GROUP, DTYPE, ASM,
                )  # fmt: skip
                out = rescaled_sum(out, alpha, added)
            else:
                words = tl.load(
                    v_ptr + begin * W + i[None, :] * W + w[:, None], mask=seen[None, :], other=0
                )
                kept = ()
                for j in tl.static_range(CODES):
                    x = _elements(words, BITS, j, DTYPE, ASM)
                    kept = kept + (tl.dot(x, p, out[j] * alpha[None, :], input_precision="ieee"),)
                out = kept
        if BITS == 8:
            scaled = ()
            for j in tl.static_range(CODES):
                scaled = scaled + (out[j] * (tl.load(vs_ptr) * 256.0),)
            store_sums(scaled, acc_ptr, rows, real, CODES, H)
        else:
            store_sums(out, acc_ptr, rows, real, CODES, H)
        tl.store(m_ptr + rows, m, mask=real)
        tl.store(l_ptr + rows, l, mask=real)
    else:
        h = tl.arange(0, H)
        query = tl.load(
            q_ptr + (unit * G + g[:, None]) * H + h[None, :], mask=real[:, None], other=0.0
        ).to(tl.float32)
        k = tl.load(k_new_ptr + unit * H + h).to(tl.float32)
        v = tl.load(v_new_ptr + unit * H + h).to(tl.float32)
        at = rows[:, None] * H + h[None, :]
        tl.store(acc_ptr + at, tl.zeros((GP, H), tl.float32) + v[None, :], mask=real[:, None])
        tl.store(m_ptr + rows, tl.sum(query * k[None, :], 1) * log2_scale, mask=real)
        tl.store(l_ptr + rows, tl.full((GP,), 1.0, tl.float32), mask=real)


def token_decode(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    lengths: Tensor,
    partials: Partials,
    *,
    bits: int,
    group: int = 0,
) -> Tensor:
    """Attend one new token over the cache and itself; nothing is changed. [B, N, 1, H].

    Parameters
    ----------
    q, k_new, v_new
        [B, N, 1, H] and [B, K, 1, H], contiguous.
    keys, values
        With their whole room. 16 bits: elements [B, K, room, H]. 8: e4m3 [B, K, room, H] and a
        one-element fp32 scale. 2, 4: codes [B, K, room, H bits / 8] uint8, scales and zero points
        [B, K, room, H / group].
    lengths
        Tokens cached, [B] int64 on the device.
    partials
        Room for B N rows and the splits + ``EXTRA_PARTS``.
    """
    b, n, _, h = q.shape
    n_kv = k_new.shape[1]
    n_splits = partials.splits - EXTRA_PARTS
    dtype, asm = dot_type(q.dtype)
    if bits == 16:
        k, v = keys[0], values[0]
        if q.dtype == torch.bfloat16:
            dtype = tl.float32 if interpreted() else tl.bfloat16
    else:
        k, v = keys[0].view(torch.int16), values[0].view(torch.int16)
    # A 16-bit cache has neither scales nor zeros, FP8 no zeros: the pointers are not used.
    ks, kz = (*keys[1:], q, q)[:2]
    vs, vz = (*values[1:], q, q)[:2]
    groups = h // group if bits < 8 else 1
    _kernel[(b * n_kv, n_splits + 1)](
        q, k_new, v_new, k, ks, kz, v, vs, vz, lengths, partials.acc, partials.m, partials.l,
        k.shape[2], n_splits, n_kv, log2_scale(h),
        BITS=bits, H=h, GROUP=group, G=n // n_kv, GP=padded_group(n // n_kv, max(1, 8 // groups)),
        BLOCK=BLOCK_TOKENS[bits], DTYPE=dtype, ASM=asm, num_warps=warps_for(h), num_stages=2,
    )  # fmt: skip
    return merge_splits(partials, torch.empty_like(q))


def _case(
    bits: int,
    size: int,
    heads: int,
    group: int,
    stored: str,
    scale: str,
    architectures: tuple[int, ...] = HOPPER,
) -> CompileCase:
    groups = size // group if bits < 8 else 1
    return CompileCase(
        name=f"{bits} bits, H {size}, {heads} query heads a KV head",
        kernel=_kernel,
        signature={
            **dict.fromkeys(("q_ptr", "k_new_ptr", "v_new_ptr"), "*bf16"),
            **dict.fromkeys(("k_ptr", "v_ptr"), stored),
            **dict.fromkeys(("ks_ptr", "kz_ptr", "vs_ptr", "vz_ptr"), scale),
            **dict.fromkeys(("acc_ptr", "m_ptr", "l_ptr"), "*fp32"),
            "length_ptr": "*i64",
            **dict.fromkeys(("capacity", "n_splits", "n_kv_heads"), "i32"),
            "log2_scale": "fp32",
        },
        constants={
            "BITS": bits,
            "H": size,
            "GROUP": group,
            "G": heads,
            "GP": padded_group(heads, max(1, 8 // groups)),
            "BLOCK": BLOCK_TOKENS[bits],
            "DTYPE": tl.bfloat16 if bits == 16 else tl.float16,
            "ASM": True,
        },
        num_warps=warps_for(size),
        num_stages=2,
        architectures=architectures,
    )


COMPILE_CASES = (
    _case(16, 128, 4, 0, "*bf16", "*bf16", ARCHITECTURES),
    _case(8, 128, 4, 0, "*i16", "*fp32"),
    _case(4, 128, 4, 64, "*i16", "*bf16"),
)
