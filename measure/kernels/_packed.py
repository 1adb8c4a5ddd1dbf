"""Products with packed matrices on tensor cores: the scales ride on the other operand."""

import triton
import triton.language as tl

from measure.kernels._unpack import fractions, scale_of


@triton.jit
def packed_product(
    words, other, scale, zero,
    BITS: tl.constexpr, GP: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Packed [n, k], dequantised, times ``other`` [k, GP]: one [words, GP] for each code of a word.

    ``words`` [words, k] are packed along n; ``scale`` and ``zero`` [k, n / GROUP].
    """
    CODES: tl.constexpr = 16 // BITS
    W: tl.constexpr = words.shape[0]
    K: tl.constexpr = words.shape[1]
    N: tl.constexpr = scale.shape[1]
    scaled = tl.reshape(other[:, :, None] * scale[:, None, :], (K, GP * N))
    offset = tl.reshape(other[:, :, None] * zero[:, None, :], (K, GP * N))
    ones = tl.full((W, K), 1.0, DTYPE)
    taken = tl.dot(ones, scaled, input_precision="ieee")
    added = tl.dot(ones, offset, input_precision="ieee")
    group = tl.arange(0, W)[:, None] * CODES // GROUP
    own = (tl.arange(0, GP * N)[None, :] % N) == group
    products = ()
    for j in tl.static_range(CODES):
        start = added * (1.0 / scale_of(BITS, j)) - taken
        x = fractions(words, BITS, j, DTYPE, ASM)
        product = tl.dot(x, scaled, start, input_precision="ieee")
        product = tl.sum(tl.reshape(tl.where(own, product, 0.0), (W, GP, N)), 2)
        products = products + (product * scale_of(BITS, j),)
    return products


@triton.jit
def packed_values(
    words_ptr, scale_ptr, zero_ptr, p, n_valid,
    BITS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Sum of the first ``n_valid`` packed values weighted by p [tokens, GP]: [words, GP] a code."""
    R: tl.constexpr = p.shape[0]
    GP: tl.constexpr = p.shape[1]
    W: tl.constexpr = H * BITS // 16
    HG: tl.constexpr = H // GROUP
    t = tl.arange(0, R)
    seen = t < n_valid
    words = tl.load(
        words_ptr + tl.arange(0, W)[:, None] + t[None, :] * W, mask=seen[None, :], other=0
    )
    at = t[:, None] * HG + tl.arange(0, HG)[None, :]
    scale = tl.load(scale_ptr + at, mask=seen[:, None], other=0.0).to(tl.float32).to(DTYPE)
    zero = tl.load(zero_ptr + at, mask=seen[:, None], other=0.0).to(tl.float32).to(DTYPE)
    return packed_product(words, p, scale, zero, BITS, GP, GROUP, DTYPE, ASM)


@triton.jit
def store_sums(values, acc_ptr, rows, mask, H: tl.constexpr):
    """Store sums [words, GP] of every code to rows of ``acc``."""
    CODES: tl.constexpr = len(values)
    w = tl.arange(0, H // CODES)
    for j in tl.static_range(CODES):
        at = rows[None, :] * H + w[:, None] * CODES + j
        tl.store(acc_ptr + at, values[j], mask=mask[None, :])
