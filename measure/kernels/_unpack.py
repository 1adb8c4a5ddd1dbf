"""Packed codes as 16-bit floats for tensor cores, two at a time and without arithmetic.

A 16-bit word holds 16 / bits codes. Code j is shifted into a half's mantissa, near its top; and-or
with the exponent of 1.0 makes the half ``1 + code / 2^e``, e from 2 to 6, an exact number. That is
one ``lop3`` for the two words of a register, and a shift that other codes share: 12 instructions
for 16 codes of 2 bits, 7 for 8 codes of 4. Scales and zero points never touch the codes: they are
multiplied into the other operand, and what the 1 adds is taken off by the accumulator's start:

    sum a s (code) = 2^e [ sum a s (1 + code / 2^e) - sum a s ]

The plain form (``ASM`` false) is for the interpreter and for fp32 caches.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def shift_of(bits, j):
    """How far code j of a word moves left (negative: right), to lie in mantissa bits 4 to 9."""
    if bits == 2:
        return (8, 4, 4, 0, 0, -4, -4, -6)[j]
    return (6, 0, -2, -6)[j]


@triton.constexpr_function
def scale_of(bits, j):
    """2^e of code j."""
    return 1 << (10 - bits * j - shift_of(bits, j))


@triton.constexpr_function
def ptx_of(bits, j):
    """Shift and and-or on a register of two words."""
    shift = shift_of(bits, j)
    mask = ((1 << bits) - 1) << (bits * j + shift)
    operation = "shl.b32" if shift > 0 else "shr.u32"
    move = f"{operation} t, $1, {abs(shift)};" if shift else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {move} lop3.b32 $0, t, {mask * 0x10001:#x}, 0x3C003C00, 0xEA; }}"


@triton.jit
def fractions(words, BITS: tl.constexpr, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """``1 + code / 2^e`` of code J of every 16-bit word."""
    if ASM:
        return tl.inline_asm_elementwise(ptx_of(BITS, J), "=r,r", [words], tl.float16, True, 2)
    code = (words.to(tl.int32) >> (BITS * J)) & ((1 << BITS) - 1)
    return (1.0 + code.to(tl.float32) / scale_of(BITS, J)).to(DTYPE)


@triton.constexpr_function
def e4m3_ptx(j):
    """The instructions that make halves of byte j of two words: sign, and 7 bits to 13..7."""
    sign, move = ("$1", "shr.u32 t, $1, 1;") if j else ("u", "shl.b32 u, $1, 8; shl.b32 t, $1, 7;")
    keep = f"and.b32 t, t, 0x3F803F80; lop3.b32 $0, {sign}, 0x80008000, t, 0xEA;"
    return f"{{ .reg .b32 t, u; {move} {keep} }}"


@triton.jit
def e4m3_halves(words, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Byte J of every word, an e4m3 number, times 2^-8: the exponent's bias is left as it is.

    Exact, subnormals included; NaN, which caches never hold, becomes 480 2^-8.
    """
    if ASM:
        return tl.inline_asm_elementwise(e4m3_ptx(J), "=r,r", [words], tl.float16, True, 2)
    byte = words.to(tl.int32) >> (8 * J)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)
