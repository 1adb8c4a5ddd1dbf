"""Seconds of a dense matrix product with weights, from physical parameters.

C[m, n] = A[m, k] B[k, n], stored elements of ``a`` bytes, 2-byte outputs.

A kernel cuts C into tiles and gives one thread block (CTA) each tile, or each part of its k range
(split-k). With S SMs, x = tiles / S:

    tile time   p = k (max(2 bm bn S / peak', (min(m, bm) + bn) a / r) + t_step) + t_tile
    compute     waves(x) p                       without split-k
                p / s + t_split + 8 s m n / 2 bw with s = S / tiles CTAs per tile (s a power of two)
    memory      [(m k + k n) a + 2 m n + re-read] miss / (e_b bw)
    time        t0 + longer + u shorter + w 2 m n / (e_b bw)

The best of a short menu of tiles counts, as a library's heuristics intend. r is what one SM can
stream from the cache. Tiles that end together write together, so a share w of the writes to C is
not hidden. Tiles are visited along m in groups of g columns, so where A outgrows the
cache it is read again for every group: m k a (n / 128 / max(g, S 128 / m) - 1) bytes.
fp8 adds the kernel that quantises the activations: m t_row + 3 m k bytes. A table made without a
captured graph shows the host instead where the host is slower.

What is ignored: that libraries sometimes pick a worse tile (the main part of the scatter, about
6 %), and that constant or zero operands run faster than real data: a few %, and by half where the
power limit binds early. The published vLLM tables multiply uninitialised weights; their large calls
on L40S fall into two groups, at 0.50 and 0.75 of the peak, that no shape tells apart.
Form after the wave-quantisation and tile analysis of NVIDIA's "Matrix Multiplication Background".
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work, peak_of
from costmodel.kernels.physics import (
    Prior,
    burst_gain,
    clock_ratio,
    element_bytes,
    limited,
    miss_fraction,
    overlapped,
    seen_cache_bytes,
    tensor_peak,
    units,
    waves,
)
from costmodel.operation import Array

Floats = NDArray[np.float64]

#: Tiles of C that are tried, rows by columns.
TILES = ((64, 64), (64, 128), (128, 128), (128, 256))
#: Fewest k elements a split keeps, and the most splits.
MIN_SPLIT_K = 128.0
MAX_SPLITS = 16.0
#: Calls shorter than about this run at a higher clock.
BURST_S = 1e-3
#: Copies of the weights that the published tables rotate through (six layers per captured graph).
REPLAYED_COPIES = 6.0
#: Several matrices share the cache: residency ends softly, as z^4.
REPLAYED_DOUBLINGS = 2
#: Waves of the largest tile beyond which the others are not tried.
MANY_WAVES = 32.0
#: Arrays up to this size try the menu at once: calls, not arithmetic, are what they take.
AT_ONCE = 256
#: Bytes moved per element by the activation quantiser: read 2, write 1.
QUANTISE_BYTES = 3.0
#: Rows and columns of a tile as the raster counts them.
RASTER_TILE = 128.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmParameters:
    """One kernel family of dense matrix products.

    launch_s                  start of the kernel, t0
    bandwidth_fraction        attained share of DRAM bandwidth, e_b
    tensor_fraction           attained share of the dense peak in long calls
    stream_bytes_per_s        what one SM streams from the cache at 1.8 GHz, r
    tile_s                    prologue and epilogue of one tile, t_tile
    step_s                    wait per element of k that loading ahead does not hide, t_step
    wave_rounding             0 perfect sharing .. 1 whole waves
    split_s                   extra cost of split-k, t_split
    unhidden_fraction         share of the shorter of compute and memory that nothing hides, u
    write_fraction            share of writing C that nothing hides, w
    cache_fraction            share of the cache an SM sees that holds replayed operands
    burst_gain                tensor rate gained by calls much shorter than 1 ms
    raster_columns            columns of tiles visited together, g
    quantise_row_s            activation quantiser: seconds per row
    quantise_bandwidth_fraction   and its share of DRAM bandwidth
    eager_s                   host time per call; only in tables made without a captured graph
    """

    launch_s: float
    bandwidth_fraction: float
    tensor_fraction: float
    stream_bytes_per_s: float
    tile_s: float
    wave_rounding: float
    split_s: float
    unhidden_fraction: float
    cache_fraction: float
    burst_gain: float
    raster_columns: float
    step_s: float = 0.0
    write_fraction: float = 0.0
    quantise_row_s: float = 0.0
    quantise_bandwidth_fraction: float = 0.5
    eager_s: float = 0.0


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(2.4e-6, 0.4, 5e-7, 3e-5, "start of the kernel"),
    "bandwidth_fraction": Prior(0.87, 0.10, 0.4, 1.0, "attained share of DRAM bandwidth"),
    "tensor_fraction": Prior(0.75, 0.20, 0.2, 1.0, "attained share of the dense peak"),
    "stream_bytes_per_s": Prior(1.5e11, 0.40, 1e10, 1e12, "one SM from the cache, at 1.8 GHz"),
    "tile_s": Prior(8e-7, 0.5, 1e-8, 1e-5, "prologue and epilogue of a tile"),
    "step_s": Prior(3e-10, 0.7, 1e-12, 1e-7, "wait per element of k"),
    "wave_rounding": Prior(0.3, 0.5, 0.02, 1.0, "0 perfect sharing, 1 whole waves"),
    "split_s": Prior(2.2e-6, 0.5, 1e-8, 1.2e-5, "extra cost of split-k"),
    "unhidden_fraction": Prior(0.25, 0.5, 0.001, 1.0, "share of the shorter activity not hidden"),
    "write_fraction": Prior(0.3, 0.6, 0.001, 1.0, "share of writing C not hidden"),
    "cache_fraction": Prior(1.0, 0.4, 0.1, 1.5, "share of the seen cache that holds operands"),
    "burst_gain": Prior(0.15, 0.7, 0.001, 1.0, "tensor rate gained by short calls"),
    "raster_columns": Prior(4.0, 0.8, 0.5, 200.0, "tile columns visited together"),
}

#: What fp8 kernels add or do differently: a slower start (two kernels), CUTLASS' plain raster.
FP8_PRIORS: dict[str, Prior] = PRIORS | {
    "launch_s": Prior(4.2e-6, 0.4, 5e-7, 3e-5, "start of quantiser and product"),
    "tensor_fraction": Prior(0.68, 0.30, 0.15, 1.0, "attained share of the dense fp8 peak"),
    "burst_gain": Prior(0.10, 0.0, 0.001, 1.0, "tensor rate gained by short calls"),
    "raster_columns": Prior(3.0, 0.8, 0.5, 200.0, "tile columns visited together"),
    "quantise_row_s": Prior(8e-10, 1.2, 1e-11, 2e-8, "activation quantiser, per row"),
    "quantise_bandwidth_fraction": Prior(0.6, 0.6, 0.05, 1.0, "its share of DRAM bandwidth"),
    "eager_s": Prior(2e-6, 2.0, 1e-7, 1e-3, "host time per call, no captured graph"),
}


def gemm_time_s(
    parameters: GemmParameters,
    device: HardwareProfile,
    m: Array,
    n: Array,
    k: Array,
    dtype: str = "bf16",
    *,
    cold: bool = True,
) -> Array:
    """Seconds of one product. Shape: that of m, n and k broadcast.

    ``dtype`` is what is multiplied and stored: bf16, fp16, fp8. ``cold`` False predicts a row of a
    replayed table (see ``physics``), eager host time included.
    """
    p = parameters
    m, n, k = (np.asarray(v, dtype=np.float64) for v in (m, n, k))
    width = element_bytes(dtype)
    peak = tensor_peak(device, dtype)
    # Of n and k there often is one each: what they make is made before the rows come in.
    a_bytes, b_bytes = m * (k * width), n * k * width
    n_bytes = m * (k * width + 2.0 * n) + b_bytes
    flops = m * (2.0 * n * k)
    memory = _memory_s(p, device, (m, n), (a_bytes, b_bytes, n_bytes), cold)
    busy = flops / (peak * p.tensor_fraction)
    rate = peak * p.tensor_fraction * burst_gain(busy, p.burst_gain, BURST_S)
    compute = _compute_s(p, device, (m, n, k), rate, width)
    seconds = p.launch_s + overlapped(compute, memory, p.unhidden_fraction)
    seconds += m * (n * (2.0 * p.write_fraction / (p.bandwidth_fraction * device.hbm_bytes_per_s)))
    if width == 1.0:
        bandwidth = p.quantise_bandwidth_fraction * device.hbm_bytes_per_s
        seconds = seconds + m * (p.quantise_row_s + QUANTISE_BYTES * k / bandwidth)
    if not cold and p.eager_s:
        seconds = np.maximum(seconds, p.eager_s)
    return limited(seconds, flops, peak, n_bytes, device, cold)


def _memory_s(
    p: GemmParameters,
    device: HardwareProfile,
    mn: tuple[Array, Array],
    parts: tuple[Array, Array, Array],
    cold: bool,
) -> Array:
    """``parts`` are the bytes of A, of B and of A, B and C together."""
    m, n = mn
    a_bytes, b_bytes, n_bytes = parts
    resident = p.cache_fraction * seen_cache_bytes(device)
    columns = np.maximum(p.raster_columns, units(device) / np.ceil(m / RASTER_TILE))
    passes = np.maximum(np.ceil(n / RASTER_TILE) / columns, 1.0)
    moved = n_bytes
    if not cold:
        working_set = n_bytes + (REPLAYED_COPIES - 1.0) * b_bytes
        moved = moved * miss_fraction(working_set, resident, doublings=REPLAYED_DOUBLINGS)
    again = (passes - 1.0) * a_bytes
    again *= miss_fraction(a_bytes, resident, doublings=REPLAYED_DOUBLINGS)
    seconds: Array = moved + again
    seconds /= p.bandwidth_fraction * device.hbm_bytes_per_s
    return seconds


def _compute_s(
    p: GemmParameters,
    device: HardwareProfile,
    mnk: tuple[Array, Array, Array],
    rate: Array,
    width: float,
) -> Array:
    m, n, k = mnk
    sms = units(device)
    stream = p.stream_bytes_per_s * clock_ratio(device)
    reduce_s = m * (n * (8.0 / (2.0 * device.hbm_bytes_per_s)))
    most_splits = np.minimum(k / MIN_SPLIT_K, MAX_SPLITS)
    parts = (m, n, k, rate, reduce_s, most_splits)
    largest, x = _tile_s(p, TILES[-1], parts, sms, width / stream)
    best: Floats = np.array(largest)
    # Over many waves of the largest tile a smaller one has nothing to gain.
    few = np.asarray(x <= MANY_WAVES)
    if not few.any():
        return best
    if few.all() and best.size <= AT_ONCE:
        every = _tile_s(p, _smaller_tiles(best.ndim), parts, sms, width / stream)[0]
        return np.asarray(np.minimum(best, np.min(every, axis=0)))
    if few.all():
        for tile in TILES[:-1]:
            np.minimum(best, _tile_s(p, tile, parts, sms, width / stream)[0], out=best)
        return best
    shape = few.shape
    some = tuple(np.broadcast_to(v, shape)[few] if np.ndim(v) else v for v in parts)
    least: Array = best[few]
    for tile in TILES[:-1]:
        least = np.minimum(least, _tile_s(p, tile, some, sms, width / stream)[0])
    best[few] = least
    return best


@functools.cache
def _smaller_tiles(n_axes: int) -> tuple[Floats, Floats]:
    """Rows and columns of all tiles but the largest, along an axis before the others."""
    shape = (-1, *[1] * n_axes)
    rows, columns = np.array(TILES[:-1], dtype=np.float64).T
    return rows.reshape(shape), columns.reshape(shape)


def _tile_s(
    p: GemmParameters,
    tile: tuple[Array, Array],
    parts: tuple[Array, ...],
    sms: float,
    stream_s_per_element: float,
) -> tuple[Array, Array]:
    """(seconds, tiles per SM) with a tile of the menu (or several, along an axis of their own), its
    k range split where that is faster.
    """
    m, n, k, rate, reduce_s, most_splits = parts
    rows, columns = tile
    tiles = np.ceil(m / rows) * np.ceil(n / columns)
    per_k = np.maximum(
        (2.0 * rows * columns * sms) / rate,
        (np.minimum(m, rows) + columns) * stream_s_per_element,
    )
    per_k += p.step_s
    loop = per_k * k
    x = tiles / sms
    seconds: Array = waves(x, p.wave_rounding) * (loop + p.tile_s)
    few = x <= 0.5  # the product fills at most half the SMs: K may be split
    if not np.any(few):
        return seconds, x
    shape = np.shape(seconds)
    loop_few, x_few, reduce_few, most_few = (
        np.broadcast_to(v, shape)[few] for v in (loop, x, reduce_s, most_splits)
    )
    splits = np.floor(np.minimum(1.0 / x_few, most_few))
    splits = np.exp2(np.floor(np.log2(np.maximum(splits, 1.0))))
    split = loop_few / splits + (p.tile_s + p.split_s) + splits * reduce_few
    whole = np.asarray(seconds)[few]
    seconds = np.asarray(seconds)
    seconds[few] = np.where(splits > 1.0, np.minimum(whole, split), whole)
    return seconds, x


def _time(
    parameters: GemmParameters, device: HardwareProfile, shape: Shape, variant: str, cold: bool
) -> Array:
    dtype = "fp8" if variant.startswith("fp8") else variant
    return gemm_time_s(parameters, device, shape["m"], shape["n"], shape["k"], dtype, cold=cold)


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    m, n, k = shape["m"], shape["n"], shape["k"]
    n_bytes = (m * k + n * k) * element_bytes(variant) + 2.0 * m * n
    return Work(2.0 * m * n * k, peak_of(device, variant), n_bytes)


def _priors(kernel: str, variant: str) -> dict[str, Prior]:
    return FP8_PRIORS if variant.startswith("fp8") else PRIORS


KIND = KernelKind(
    name="gemm",
    parameters=GemmParameters,
    shape=("m", "n", "k"),
    variants=("bf16", "fp8", "fp8_block"),
    priors=_priors,
    structure=lambda kernel, variant: {},
    time_s=_time,
    work=_work,
)
