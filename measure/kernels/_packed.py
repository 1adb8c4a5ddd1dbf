"""Products with packed matrices on tensor cores: the scales ride on the other operand.

A packed matrix is taken in tiles of ``TILE_WORDS`` rows of words, what one tensor instruction
holds: the quantisation groups of such a tile are few, and only their columns are multiplied.
"""

import triton
import triton.language as tl

from measure.kernels._unpack import fractions, scale_of

#: Rows of words of a tile.
TILE_WORDS = tl.constexpr(16)


@triton.constexpr_function
def groups_of(n_codes, group):
    """Quantisation groups that ``n_codes`` neighbours belong to."""
    return max(1, n_codes // group)


@triton.jit
def packed_product(
    words, other, scale, zero, before,
    BITS: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Packed [n, k], dequantised, times ``other`` [k, GP]: [words, GP] for each code of a word.

    ``words`` [words, k] are packed along n; ``scale`` and ``zero`` [k, groups]. Where more of k
    follows (not LAST), what is returned goes into the next call as ``before``, which starts as ().
    """
    CODES: tl.constexpr = 16 // BITS
    W: tl.constexpr = words.shape[0]
    K: tl.constexpr = words.shape[1]
    N: tl.constexpr = scale.shape[1]
    GP: tl.constexpr = other.shape[1]
    scaled = tl.reshape(other[:, :, None] * scale[:, None, :], (K, GP * N))
    offset = tl.reshape(other[:, :, None] * zero[:, None, :], (K, GP * N))
    ones = tl.full((W, K), 1.0, DTYPE)
    taken = tl.dot(ones, scaled, input_precision="ieee")
    added = tl.dot(ones, offset, input_precision="ieee")
    own = (tl.arange(0, GP * N)[None, :] % N) == (tl.arange(0, W)[:, None] * CODES // GROUP)
    products = ()
    for j in tl.static_range(CODES):
        product = added * (1.0 / scale_of(BITS, j)) - taken
        if len(before) > 0:
            product += before[j]
        x = fractions(words, BITS, j, DTYPE, ASM)
        product = tl.dot(x, scaled, product, input_precision="ieee")
        if LAST:
            # Of the columns of all groups each row keeps its own.
            if N > 1:
                product = tl.sum(tl.reshape(tl.where(own, product, 0.0), (W, GP, N)), 2)
            product *= scale_of(BITS, j)
        products = products + (product,)
    return products


@triton.jit
def packed_values(
    words_ptr, scale_ptr, zero_ptr, p, n_valid,
    BITS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Sum of the first ``n_valid`` packed values weighted by p [tokens, GP].

    [words of a tile, GP] for each code of each tile of the head.
    """
    R: tl.constexpr = p.shape[0]
    W: tl.constexpr = H * BITS // 16
    WT: tl.constexpr = min(W, TILE_WORDS)
    HG: tl.constexpr = H // GROUP
    N: tl.constexpr = groups_of(WT * 16 // BITS, GROUP)
    t = tl.arange(0, R)
    seen = t < n_valid
    products = ()
    for tile in tl.static_range(W // WT):
        w = tl.arange(0, WT) + tile * WT
        words = tl.load(words_ptr + w[:, None] + t[None, :] * W, mask=seen[None, :], other=0)
        g = tl.arange(0, N) + tile * WT * (16 // BITS) // GROUP
        at = t[:, None] * HG + g[None, :]
        scale = tl.load(scale_ptr + at, mask=seen[:, None], other=0.0).to(tl.float32).to(DTYPE)
        zero = tl.load(zero_ptr + at, mask=seen[:, None], other=0.0).to(tl.float32).to(DTYPE)
        products = products + packed_product(
            words, p, scale, zero, (), BITS, GROUP, True, DTYPE, ASM
        )
    return products


@triton.jit
def no_values(BITS: tl.constexpr, H: tl.constexpr, GP: tl.constexpr):
    """What :func:`packed_values` gives of no token."""
    W: tl.constexpr = H * BITS // 16
    WT: tl.constexpr = min(W, TILE_WORDS)
    values = ()
    for _ in tl.static_range(W // WT * (16 // BITS)):
        values = values + (tl.zeros((WT, GP), tl.float32),)
    return values


@triton.jit
def rescaled_sum(values, alpha, added):
    """``values`` times alpha [GP], plus ``added``."""
    out = ()
    for j in tl.static_range(len(values)):
        out = out + (values[j] * alpha[None, :] + added[j],)
    return out


@triton.jit
def store_sums(values, acc_ptr, rows, mask, CODES: tl.constexpr, H: tl.constexpr):
    """Store sums [words of a tile, GP] of every code of every tile to rows of ``acc``."""
    WT: tl.constexpr = values[0].shape[0]
    w = tl.arange(0, WT)
    for j in tl.static_range(len(values)):
        h = (j // CODES * WT + w) * CODES + j % CODES
        tl.store(acc_ptr + rows[None, :] * H + h[:, None], values[j], mask=mask[None, :])
