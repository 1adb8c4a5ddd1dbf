"""Parts of a KIVI cache attended by one program: packed tiles, the block in between, the recent."""

import triton
import triton.language as tl

from measure.kernels._packed import (
    groups_of,
    no_values,
    packed_product,
    packed_values,
    rescaled_sum,
    store_sums,
)


@triton.jit
def _scores(
    words_ptr, scale_ptr, zero_ptr, q, tile,
    BITS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of keys in units of log2: [words, GP] for each code of a word."""
    HC: tl.constexpr = q[0].shape[0]
    W: tl.constexpr = R * BITS // 16
    WT: tl.constexpr = TILE * BITS // 16
    TG: tl.constexpr = R // GROUP
    N: tl.constexpr = groups_of(TILE, GROUP)
    # A block [H, W] of R tokens holds R / TILE tiles side by side.
    block = tile // (R // TILE) * (HC * len(q))
    part = tl.cast(tile % (R // TILE), tl.int32)
    words_ptr += block * W
    scale_ptr += block * TG
    zero_ptr += block * TG
    w = part * WT + tl.arange(0, WT)
    g = part * TILE // GROUP + tl.arange(0, N)
    sums = ()
    for c in tl.static_range(len(q)):
        h = tl.arange(0, HC) + c * HC
        words = tl.load(words_ptr + w[:, None] + h[None, :] * W)
        at = h[:, None] * TG + g[None, :]
        scale = tl.load(scale_ptr + at).to(tl.float32).to(DTYPE)
        zero = tl.load(zero_ptr + at).to(tl.float32).to(DTYPE)
        sums = packed_product(
            words, q[c], scale, zero, sums, BITS, GROUP, c == len(q) - 1, DTYPE, ASM
        )
    return sums


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


@triton.jit
def _leave(acc_ptr, m_ptr, l_ptr, out, m, l, rows, real, CODES: tl.constexpr, H: tl.constexpr):
    """Store a partial result; ``out`` as ``packed_values`` gives it."""
    store_sums(out, acc_ptr, rows, real, CODES, H)
    tl.store(m_ptr + rows, m, mask=real)
    tl.store(l_ptr + rows, l, mask=real)


@triton.jit
def attend_packed(
    kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, acc_ptr, m_ptr, l_ptr, q, rows, real,
    first, last,
    BITS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Tiles first..last-1 of one head's tokens, keys and values packed."""
    CODES: tl.constexpr = 16 // BITS
    GP: tl.constexpr = q[0].shape[1]
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)
    out = no_values(BITS, H, GP)
    for tile in range(first, last):
        scores = _scores(kw_ptr, ks_ptr, kz_ptr, q, tile, BITS, R, TILE, GROUP, DTYPE, ASM)
        p, m, l, alpha = _softmax(scores, m, l, CODES, DTYPE)
        token = tile * TILE
        added = packed_values(
            vw_ptr + token * (H // CODES), vs_ptr + token * (H // GROUP),
            vz_ptr + token * (H // GROUP), p, TILE, BITS, H, GROUP, DTYPE, ASM,
        )  # fmt: skip
        out = rescaled_sum(out, alpha, added)
    _leave(acc_ptr, m_ptr, l_ptr, out, m, l, rows, real, CODES, H)


@triton.jit
def attend_mixed(
    kw_ptr, ks_ptr, kz_ptr, vw_ptr, vs_ptr, vz_ptr, rv_ptr, acc_ptr, m_ptr, l_ptr, q, rows, real,
    block, n_values, n_tiles, ring_start,
    BITS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The block whose keys are packed, its values before ``n_values`` too, the others in the ring.

    Leaves two partial results; ``n_tiles`` 0: there is no such block.
    """
    CODES: tl.constexpr = 16 // BITS
    GP: tl.constexpr = q[0].shape[1]
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)
    l_ring = tl.zeros((GP,), tl.float32)
    out = no_values(BITS, H, GP)
    acc = ()
    for c in tl.static_range(H // CHUNK):
        acc = acc + (tl.zeros((CHUNK, GP), tl.float32),)
    t = tl.arange(0, TILE)
    for part in tl.range(0, n_tiles, num_stages=1):
        tile = block * (R // TILE) + part
        scores = _scores(kw_ptr, ks_ptr, kz_ptr, q, tile, BITS, R, TILE, GROUP, DTYPE, ASM)
        p, m, _, alpha = _softmax(scores, m, l, CODES, DTYPE)
        token = tile * TILE
        n_packed = tl.minimum(tl.maximum(n_values - token, 0), TILE).to(tl.int32)
        in_ring = t >= n_packed
        packed = tl.where(in_ring[:, None], 0.0, p)
        ringed = tl.where(in_ring[:, None], p, 0.0)
        l = l * alpha + tl.sum(packed.to(tl.float32), 0)
        l_ring = l_ring * alpha + tl.sum(ringed.to(tl.float32), 0)
        added = packed_values(
            vw_ptr + token * (H // CODES), vs_ptr + token * (H // GROUP),
            vz_ptr + token * (H // GROUP), packed, n_packed, BITS, H, GROUP, DTYPE, ASM,
        )  # fmt: skip
        out = rescaled_sum(out, alpha, added)
        slot = ((token + t + R - ring_start) % R).to(tl.int64)
        more = ()
        for c in tl.static_range(H // CHUNK):
            h = tl.arange(0, CHUNK) + c * CHUNK
            v = tl.load(rv_ptr + slot[None, :] * H + h[:, None], mask=in_ring[None, :], other=0.0)
            v = v.to(tl.float32).to(DTYPE)
            more = more + (tl.dot(v, ringed, acc[c] * alpha[None, :], input_precision="ieee"),)
        acc = more
    _leave(acc_ptr, m_ptr, l_ptr, out, m, l, rows, real, CODES, H)
    rows += 1
    for c in tl.static_range(H // CHUNK):
        at = rows[None, :] * H + (tl.arange(0, CHUNK) + c * CHUNK)[:, None]
        tl.store(acc_ptr + at, acc[c], mask=real[None, :])
    tl.store(m_ptr + rows, m, mask=real)
    tl.store(l_ptr + rows, l_ring, mask=real)


@triton.jit
def attend_recent(
    k_new_ptr, v_new_ptr, rk_ptr, rv_ptr, acc_ptr, m_ptr, l_ptr, q, rows, real, length, ring_start,
    H: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The new token, then residual keys with ring values."""
    HC: tl.constexpr = q[0].shape[0]
    GP: tl.constexpr = q[0].shape[1]
    m = tl.zeros((GP,), tl.float32)
    for c in tl.static_range(H // HC):
        new = tl.load(k_new_ptr + (tl.arange(0, HC) + c * HC)).to(tl.float32).to(DTYPE)
        m += tl.sum(q[c].to(tl.float32) * new.to(tl.float32)[:, None], 0)
    l = tl.full((GP,), 1.0, tl.float32)
    h = tl.arange(0, H)
    acc = tl.zeros((H, GP), tl.float32) + tl.load(v_new_ptr + h).to(tl.float32)[:, None]
    begin = length // R * R
    n_recent = (length - begin).to(tl.int32)
    for start in tl.range(0, n_recent, CHUNK, num_stages=1):
        i = start + tl.arange(0, CHUNK)
        held = i < n_recent
        s = tl.zeros((CHUNK, GP), tl.float32)
        for c in tl.static_range(H // HC):
            at = i[:, None] * H + (tl.arange(0, HC) + c * HC)[None, :]
            k = tl.load(rk_ptr + at, mask=held[:, None], other=0.0)
            s = tl.dot(k.to(tl.float32).to(DTYPE), q[c], s, input_precision="ieee")
        s = tl.where(held[:, None], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 0))
        alpha = tl.exp2(m - largest)
        m = largest
        p = tl.exp2(s - m[None, :])
        l = l * alpha + tl.sum(p, 0)
        slot = ((begin + i + R - ring_start) % R).to(tl.int64)
        v = tl.load(rv_ptr + slot[None, :] * H + h[:, None], mask=held[None, :], other=0.0)
        v = v.to(tl.float32).to(DTYPE)
        acc = tl.dot(v, p.to(DTYPE), acc * alpha[None, :], input_precision="ieee")
    tl.store(acc_ptr + rows[None, :] * H + h[:, None], acc, mask=real[None, :])
    tl.store(m_ptr + rows, m, mask=real)
    tl.store(l_ptr + rows, l, mask=real)
