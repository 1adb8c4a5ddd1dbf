"""Quantise and append: what a decode step adds to a packed cache, in place, in one launch.

KIVI   the new key goes to the residual; when that is full, its R keys become one block, quantised
       per channel. The oldest value of a full ring is quantised per token, the new one takes its
       slot.
tokens the new key and value are packed as they are cached (FlexGen: groups; FP8; 16 bits: copied).

Codes, scales and zero points are those of ``measure.methods.packing.quantise``: rounded half to
even against scale and zero as stored. Everything is decided by the number of cached tokens, which
lies on the device and is advanced here: the last program to arrive knows that all others have read
it. A captured graph can so be replayed for every token.

Bytes per step and KV head: new key and value in and out, 4 H b; KIVI reads the leaving value and
writes its codes, H (b + e); a full block costs R H (b + e) every R steps. All of it is a few
kilobytes: the launch binds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels._compile import HOPPER, CompileCase
from measure.methods.packing import quantise, quantise_bytes

#: Arguments that are not specialised: a compilation each would cost more than it gains.
_KIVI_COUNTS = ("key_capacity", "value_capacity", "recent_capacity", "ring_start")
_COUNTS = ("n_kv_heads", "n_sequences", "programs")
#: Channels of a block that one program quantises.
_CHANNELS = 32


def reference_block(recent_keys: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise R keys [B, K, R, H] as one block [B, K, 1, H, ...]."""
    return quantise(recent_keys.unsqueeze(2).transpose(-1, -2), bits, group)


def reference_token(x: Tensor, bits: int, group: int, scale: Tensor | None) -> tuple[Tensor, ...]:
    """Pack one token [B, K, 1, H]."""
    if bits == 16:
        return (x,)
    if bits == 8:
        assert scale is not None
        return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn),)
    return quantise_bytes(x, bits, group)


@triton.jit
def _rounded(x, stored: tl.constexpr):
    """To the stored type, to the nearest: spelled out for bf16, which the interpreter truncates."""
    if stored == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(stored)


@triton.jit
def _quantised(x, BITS: tl.constexpr, stored: tl.constexpr):
    """Codes, scale and zero of groups along axis 1 of x [groups, GROUP, rest], fp32."""
    levels: tl.constexpr = (1 << BITS) - 1
    low = tl.min(x, 1)
    zero = _rounded(low, stored)
    scale = _rounded(tl.div_rn(tl.max(x, 1) - low, tl.zeros_like(low) + levels), stored)
    wide = scale.to(tl.float32)
    step = tl.where(wide == 0.0, 1.0, wide)
    code = tl.div_rn(x - zero.to(tl.float32)[:, None, :], tl.zeros_like(x) + step[:, None, :])
    # Adding 1.5 x 2^23 leaves no fraction bits: rounds half to even.
    code = (code + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, 0.0), levels)
    return code.to(tl.int32), scale, zero


@triton.jit
def _words(codes, BITS: tl.constexpr, N: tl.constexpr, REST: tl.constexpr):
    """Codes [N, REST] as 16-bit words [N / codes, REST], the first code lowest."""
    CODES: tl.constexpr = 16 // BITS
    parts = tl.reshape(codes, (N // CODES, CODES, REST))
    shifts = tl.arange(0, CODES) * BITS
    return tl.sum(parts << shifts[None, :, None], 1).to(tl.int16)


@triton.jit
def _pack_token(
    x, words_ptr, scale_ptr, zero_ptr,
    BITS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Quantise one token x [H] (fp32) and store its parts."""
    W: tl.constexpr = H * BITS // 16
    HG: tl.constexpr = H // GROUP
    grouped = tl.reshape(x, (HG, GROUP, 1))
    codes, scale, zero = _quantised(grouped, BITS, scale_ptr.dtype.element_ty)
    words = tl.reshape(_words(tl.reshape(codes, (H, 1)), BITS, H, 1), (W,))
    tl.store(words_ptr + tl.arange(0, W), words)
    tl.store(scale_ptr + tl.arange(0, HG), tl.reshape(scale, (HG,)))
    tl.store(zero_ptr + tl.arange(0, HG), tl.reshape(zero, (HG,)))


@triton.jit
def _e4m3(x):
    """Bits of the nearest e4m3 number, ties to even, saturating; by integers on any GPU."""
    a = tl.minimum(tl.abs(x), 448.0)
    bits = a.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    tiny = ((a * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(a < 0.015625, tiny, normal) | sign).to(tl.int8)


@triton.jit
def _advance(length_ptr, arrived_ptr, programs, n_sequences, BP: tl.constexpr):
    """Count this program in; the last one adds a token to every sequence."""
    if tl.atomic_add(arrived_ptr, 1) == programs - 1:
        b = tl.arange(0, BP)
        lengths = tl.load(length_ptr + b, mask=b < n_sequences, other=0)
        tl.store(length_ptr + b, lengths + 1, mask=b < n_sequences)
        tl.store(arrived_ptr, 0)


@triton.jit(do_not_specialize=(*_KIVI_COUNTS, *_COUNTS))
def _kivi_kernel(
    k_new_ptr, v_new_ptr, kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, rk_ptr, rv_ptr,
    length_ptr, arrived_ptr,
    key_capacity, value_capacity, recent_capacity, ring_start, n_kv_heads, n_sequences, programs,
    BITS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, HC: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = R * BITS // 16
    TG: tl.constexpr = R // GROUP
    unit = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    length = tl.load(length_ptr + unit // n_kv_heads)
    recent = unit * recent_capacity
    at_recent = length % R
    if part == 0:
        h = tl.arange(0, H)
        tl.store(rk_ptr + (recent + at_recent) * H + h, tl.load(k_new_ptr + unit * H + h))
        slot = rv_ptr + (recent + (length + R - ring_start) % R) * H + h
        if length >= R:
            token = unit * value_capacity + length - R
            leaving = tl.load(slot).to(tl.float32)
            _pack_token(
                leaving, vw_ptr + token * (H * BITS // 16), vs_ptr + token * (H // GROUP),
                vz_ptr + token * (H // GROUP), BITS, H, GROUP,
            )  # fmt: skip
        tl.store(slot, tl.load(v_new_ptr + unit * H + h))
    elif at_recent == R - 1:
        h = (part - 1) * HC + tl.arange(0, HC)
        t = tl.arange(0, R)
        x = tl.load(
            rk_ptr + (recent + t[:, None]) * H + h[None, :], mask=t[:, None] < R - 1, other=0.0
        ).to(tl.float32)
        new = tl.load(k_new_ptr + unit * H + h).to(tl.float32)
        x = tl.where(t[:, None] == R - 1, tl.zeros_like(x) + new[None, :], x)
        codes, scale, zero = _quantised(
            tl.reshape(x, (TG, GROUP, HC)), BITS, ks_ptr.dtype.element_ty
        )
        words = _words(tl.reshape(codes, (R, HC)), BITS, R, HC)
        block = (unit * key_capacity + length // R) * H + h
        tl.store(kw_ptr + block[None, :] * W + tl.arange(0, W)[:, None], words)
        groups = block[None, :] * TG + tl.arange(0, TG)[:, None]
        tl.store(ks_ptr + groups, scale)
        tl.store(kz_ptr + groups, zero)
    _advance(length_ptr, arrived_ptr, programs, n_sequences, BP)


@triton.jit(do_not_specialize=("capacity", *_COUNTS))
def _token_kernel(
    k_new_ptr, v_new_ptr, k_ptr, ks_ptr, kz_ptr, v_ptr, vs_ptr, vz_ptr, length_ptr, arrived_ptr,
    capacity, n_kv_heads, n_sequences, programs,
    BITS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    token = unit * capacity + tl.load(length_ptr + unit // n_kv_heads)
    if tl.program_id(1) == 0:
        new, place, scales, zeros = k_new_ptr, k_ptr, ks_ptr, kz_ptr
    else:
        new, place, scales, zeros = v_new_ptr, v_ptr, vs_ptr, vz_ptr
    h = tl.arange(0, H)
    x = tl.load(new + unit * H + h)
    if BITS == 16:
        tl.store(place + token * H + h, x)
    elif BITS == 8:
        tl.store(
            place + token * H + h, _e4m3(tl.div_rn(x.to(tl.float32), tl.load(scales) + 0.0 * h))
        )
    else:
        _pack_token(
            x.to(tl.float32), place + token * (H * BITS // 16), scales + token * (H // GROUP),
            zeros + token * (H // GROUP), BITS, H, GROUP,
        )  # fmt: skip
    _advance(length_ptr, arrived_ptr, programs, n_sequences, BP)


def kivi_append(
    k_new: Tensor,
    v_new: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor],
    recent_keys: Tensor,
    recent_values: Tensor,
    lengths: Tensor,
    arrived: Tensor,
    *,
    bits: int,
    group: int,
    residual: int,
    ring_start: int,
) -> None:
    """Add one token to a KIVI cache; tensors as in ``kivi_decode``, ``arrived`` one int32 zero."""
    b, n_kv, _, h = k_new.shape
    channels = min(_CHANNELS, h)
    grid = (b * n_kv, 1 + h // channels)
    _kivi_kernel[grid](
        k_new, v_new,
        keys[0].view(torch.int16), keys[1], keys[2],
        values[0].view(torch.int16), values[1], values[2],
        recent_keys, recent_values, lengths, arrived,
        keys[0].shape[2], values[0].shape[2], recent_keys.shape[2], ring_start, n_kv, b,
        grid[0] * grid[1],
        BITS=bits, H=h, R=residual, GROUP=group, HC=channels, BP=triton.next_power_of_2(b),
        num_warps=4,
    )  # fmt: skip


def token_append(
    k_new: Tensor,
    v_new: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    lengths: Tensor,
    arrived: Tensor,
    *,
    bits: int,
    group: int = 0,
) -> None:
    """Add one token to a token-wise cache; tensors as in ``token_decode``."""
    b, n_kv, _, h = k_new.shape
    kind = {16: keys[0].dtype, 8: torch.int8}.get(bits, torch.int16)
    k, v = keys[0].view(kind), values[0].view(kind)
    ks, kz = (*keys[1:], k_new, k_new)[:2]
    vs, vz = (*values[1:], k_new, k_new)[:2]
    _token_kernel[(b * n_kv, 2)](
        k_new, v_new, k, ks, kz, v, vs, vz, lengths, arrived,
        k.shape[2], n_kv, b, b * n_kv * 2,
        BITS=bits, H=h, GROUP=group, BP=triton.next_power_of_2(b), num_warps=1,
    )  # fmt: skip


def _signature(words: str, scales: str, *names: str) -> dict[str, str]:
    return {
        **dict.fromkeys(("k_new_ptr", "v_new_ptr"), "*bf16"),
        **dict.fromkeys(names[:2], words),
        **dict.fromkeys(("ks_ptr", "kz_ptr", "vs_ptr", "vz_ptr"), scales),
        **dict.fromkeys(names[2:], "i32"),
        "length_ptr": "*i64",
        "arrived_ptr": "*i32",
    }


COMPILE_CASES = (
    CompileCase(
        name="KIVI-2, H 128",
        kernel=_kivi_kernel,
        signature={
            **_signature(
                *("*i16", "*bf16", "kw_ptr", "vw_ptr", *_KIVI_COUNTS, *_COUNTS),
            ),
            **dict.fromkeys(("rk_ptr", "rv_ptr"), "*bf16"),
        },
        constants={"BITS": 2, "H": 128, "R": 128, "GROUP": 32, "HC": 32, "BP": 8},
        architectures=HOPPER,
    ),
    CompileCase(
        name="16 bits, H 128",
        kernel=_token_kernel,
        signature=_signature("*bf16", "*bf16", "k_ptr", "v_ptr", "capacity", *_COUNTS),
        constants={"BITS": 16, "H": 128, "GROUP": 0, "BP": 8},
        num_warps=1,
        architectures=HOPPER,
    ),
    CompileCase(
        name="FlexGen-4, H 128",
        kernel=_token_kernel,
        signature=_signature("*i16", "*bf16", "k_ptr", "v_ptr", "capacity", *_COUNTS),
        constants={"BITS": 4, "H": 128, "GROUP": 64, "BP": 8},
        num_warps=1,
    ),
    CompileCase(
        name="FP8, H 128",
        kernel=_token_kernel,
        signature=_signature("*i8", "*fp32", "k_ptr", "v_ptr", "capacity", *_COUNTS),
        constants={"BITS": 8, "H": 128, "GROUP": 0, "BP": 8},
        num_warps=1,
        architectures=HOPPER,
    ),
)
