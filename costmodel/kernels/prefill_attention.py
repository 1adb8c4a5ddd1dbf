"""Seconds of one layer's attention over a prompt, from physical parameters.

A thread block (CTA) works on a tile of R query rows of one head (or of a packed group of heads)
and walks the keys those rows see. With S SMs and D the head size padded to 32,

    per pair   4 D S / (e_c peak)  against  1 / exp rate: matrix units and exponentials overlap
    tile       rows * mean keys * per pair + t_cta ;  longest: rows * most keys * per pair + t_cta
    compute    max(waves(tiles / S) * mean tile, longest tile)
    memory     (queries + keys + values + outputs) / (e_b bw), or the cache's rate where they fit
    time       t0 + longer + u shorter + cache append

Causal rows see half the prompt on average; a window shortens the walk to W + R keys, unless the
kernel executes the masked tiles anyway (``masked_fraction``). Encoder attention sees everything.
Long single prompts are bound by the longest tile, small ones by launch and prologue.

What is ignored: the order in which tiles are scheduled (longest first in good kernels).
Form after the tiling of FlashAttention-2 and -3 (arXiv:2307.08691, arXiv:2407.08608).
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work, kernel_class
from costmodel.kernels.physics import (
    Prior,
    cache_bytes,
    cache_bytes_per_s,
    clock_ratio,
    fp8_share,
    limited,
    miss_fraction,
    overlapped,
    tensor_peak,
    units,
    waves,
)
from costmodel.operation import Array

#: Keys of one block of the walk.
KEY_BLOCK = 128.0
#: Rows an instruction needs at least.
MIN_ROWS = 16.0
#: Head sizes run as the next multiple of this.
HEAD_DIM_STEP = 32.0
#: Head sizes that leave room for tiles of more rows, or only for fewer, in kernels with several.
SLIM_HEAD_DIM = 96.0
DEEP_HEAD_DIM = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillAttentionParameters:
    """One kernel family of prefill attention.

    launch_s             start of the kernel, t0
    tensor_fraction      attained share of the dense peak, e_c
    fp8_ratio            speed with an fp8 cache or fp8 inputs against bf16
    exponentials_per_s   of one SM at 1.8 GHz
    unhidden_exponential share of the shorter of products and exponentials that nothing hides
    wide_head_cost       factor on the products for head sizes above 128
    masked_fraction      share of the tiles outside a window that run all the same
    cta_s                prologue and epilogue of a tile
    wave_rounding        0 perfect sharing .. 1 whole waves; of encoders: encoder_wave_rounding
    bandwidth_fraction   attained share of DRAM bandwidth, e_b
    append_fraction      share of DRAM bandwidth of the kernel that writes keys and values away
    append_token_s       more per token it writes
    unhidden_fraction    share of the shorter of compute and memory that nothing hides, u
    cache_fraction       share of the last-level cache that holds replayed operands
    cache_rate_fraction  attained share of the last-level cache's rate
    fp8_s, fp8_passes    extra start with an fp8 cache, and passes over keys and values
    tile_rows            rows of a tile; packs_heads 1: rows of a group's heads fill tiles together;
                         swaps_heads 1: those of single queries do; fits_rows 1: short prompts get
                         smaller tiles; slim_rows, deep_rows: rows of a tile for heads of at most 96
                         and at least 256, if not 0
    """

    launch_s: float
    tensor_fraction: float
    fp8_ratio: float
    exponentials_per_s: float
    unhidden_exponential: float
    wide_head_cost: float
    masked_fraction: float
    cta_s: float
    wave_rounding: float
    encoder_wave_rounding: float
    bandwidth_fraction: float
    append_fraction: float
    append_token_s: float
    unhidden_fraction: float
    cache_fraction: float
    cache_rate_fraction: float
    fp8_s: float
    fp8_passes: float
    tile_rows: float = 128.0
    packs_heads: float = 1.0
    swaps_heads: float = 1.0
    fits_rows: float = 0.0
    slim_rows: float = 0.0
    deep_rows: float = 0.0


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(8e-6, 0.5, 1e-6, 6e-5, "start of the kernel"),
    "tensor_fraction": Prior(0.72, 0.25, 0.2, 1.0, "attained share of the dense peak"),
    "fp8_ratio": Prior(1.15, 0.3, 0.3, 2.0, "speed with fp8 against bf16"),
    "exponentials_per_s": Prior(2.4e10, 0.4, 4e9, 2e11, "exponentials of one SM at 1.8 GHz"),
    "unhidden_exponential": Prior(0.2, 0.5, 0.001, 1.0, "share of the shorter not hidden"),
    "wide_head_cost": Prior(1.1, 0.2, 0.6, 2.5, "cost factor of head sizes above 128"),
    "masked_fraction": Prior(0.02, 1.5, 0.001, 1.0, "tiles outside a window that still run"),
    "cta_s": Prior(1.7e-6, 0.6, 1e-8, 2e-5, "prologue and epilogue of a tile"),
    "wave_rounding": Prior(0.5, 0.6, 0.02, 1.0, "0 perfect sharing, 1 whole waves"),
    "encoder_wave_rounding": Prior(0.5, 0.6, 0.02, 1.0, "the same, all rows alike"),
    "bandwidth_fraction": Prior(0.75, 0.15, 0.3, 1.0, "attained share of DRAM bandwidth"),
    "append_fraction": Prior(0.8, 0.4, 0.05, 4.0, "bandwidth share of the cache append"),
    "append_token_s": Prior(5e-10, 1.2, 1e-12, 1e-7, "cache append, per token"),
    "unhidden_fraction": Prior(0.3, 0.6, 0.001, 1.0, "share of the shorter activity not hidden"),
    "cache_fraction": Prior(0.6, 0.4, 0.1, 1.5, "cache share that holds replayed operands"),
    "cache_rate_fraction": Prior(0.3, 0.6, 0.03, 1.0, "attained share of the cache's rate"),
    "fp8_s": Prior(2e-6, 0.8, 1e-9, 2e-5, "extra start with an fp8 cache"),
    "fp8_passes": Prior(1.0, 0.8, 0.01, 10.0, "passes over keys and values to convert them"),
}


def prefill_attention_time_s(
    parameters: PrefillAttentionParameters,
    device: HardwareProfile,
    batch: Array,
    q_len: Array,
    n_heads: Array,
    n_kv_heads: Array,
    head_dim: Array,
    element_bytes: Array = 2.0,
    *,
    v_head_dim: Array | None = None,
    kv_len: Array | None = None,
    window: Array = 0.0,
    causal: Array = 1.0,
    cold: bool = True,
) -> Array:
    """Seconds of one layer's prefill attention. Shape: that of the arguments broadcast.

    ``kv_len`` keys per sequence (default: ``q_len``; more with a cached prefix, whose queries are
    the last ones); ``causal`` 0 for encoders, which append no cache; ``window`` 0 means none.
    """
    p = parameters
    q = np.asarray(q_len, dtype=np.float64)
    keys = q if kv_len is None else np.asarray(kv_len, dtype=np.float64)
    v_dim = head_dim if v_head_dim is None else v_head_dim
    tiles, rows = _tiles(p, q, (n_heads, n_kv_heads), head_dim)
    mean_keys, most_keys, pairs = _walk(p, q, keys, window, causal)
    per_pair = _seconds_per_pair(p, device, head_dim, v_dim, element_bytes)
    mean = rows * mean_keys * per_pair + p.cta_s
    longest = rows * most_keys * per_pair + p.cta_s
    sms = units(device)
    rounding: Array = p.wave_rounding
    if np.any(np.equal(causal, 0.0)):
        rounding = np.where(np.equal(causal, 0.0), p.encoder_wave_rounding, p.wave_rounding)
    compute = np.maximum(waves(batch * tiles / sms, rounding) * mean, longest)

    width = head_dim + v_dim
    queries = batch * q
    cache = batch * keys * (n_kv_heads * width * 2.0)
    moved = queries * (n_heads * width * 2.0) + cache
    miss: Array = np.float64(1.0)
    if not cold:
        miss = miss_fraction(moved, p.cache_fraction * cache_bytes(device))
    bandwidth = device.hbm_bytes_per_s
    cache_rate = p.cache_rate_fraction * cache_bytes_per_s(device)
    per_byte = miss / (p.bandwidth_fraction * bandwidth) + (1.0 - miss) / cache_rate
    memory = moved * per_byte
    new_bytes = n_kv_heads * width * 2.0
    slowdown = p.bandwidth_fraction / p.append_fraction
    append_s = p.append_token_s + 2.0 * new_bytes * (per_byte * slowdown)
    append = queries * (causal * append_s)
    seconds = p.launch_s + overlapped(compute, memory, p.unhidden_fraction) + append
    is_fp8 = np.less(element_bytes, 1.5)
    if np.any(is_fp8):
        convert = p.fp8_s + queries * new_bytes * (1.5 * p.fp8_passes / bandwidth)
        seconds = seconds + np.where(is_fp8, convert, 0.0)
    flops = batch * pairs * (2.0 * n_heads * width * fp8_share(device, element_bytes))
    least = np.where(is_fp8, 0.5 * cache, cache) + (moved - cache)
    return limited(seconds, flops, tensor_peak(device, "bf16"), least, device, cold)


def _tiles(
    p: PrefillAttentionParameters, q: Array, heads: tuple[Array, Array], head_dim: Array
) -> tuple[Array, Array]:
    """Row tiles of one sequence over all heads, and the rows one of them computes.

    ``heads``: query heads and KV heads.
    """
    n_heads, n_kv_heads = np.asarray(heads[0], dtype=np.float64), heads[1]
    group = n_heads / n_kv_heads
    tile: Array = np.float64(p.tile_rows)
    if p.slim_rows:
        tile = np.where(np.less_equal(head_dim, SLIM_HEAD_DIM), p.slim_rows, tile)
    if p.deep_rows:
        tile = np.where(np.greater_equal(head_dim, DEEP_HEAD_DIM), p.deep_rows, tile)
    packed = bool(p.packs_heads) | (np.less_equal(q, 1.0) & bool(p.swaps_heads))
    used = np.where(packed, q * group, q)
    tiles = np.where(packed, n_kv_heads, n_heads) * np.ceil(used / tile)
    if not p.fits_rows:
        return tiles, tile
    return tiles, np.minimum(tile, np.ceil(used / MIN_ROWS) * MIN_ROWS)


def _walk(
    p: PrefillAttentionParameters, q: Array, keys: Array, window: Array, causal: Array
) -> tuple[Array, Array, Array]:
    """Mean and most keys a tile walks, and the pairs that exist per head."""
    prefix = keys - q
    all_keys = np.ceil(keys / KEY_BLOCK) * KEY_BLOCK
    span = np.minimum(p.tile_rows, q)
    half = span / 2.0 + KEY_BLOCK / 2.0
    pairs = q * (prefix + (q + 1.0) / 2.0)
    mean, most = prefix + q / 2.0 + half, all_keys
    if np.any(window):
        w = np.minimum(np.where(np.asarray(window) > 0, window, keys), keys)
        ramp = np.clip(w - prefix, 0.0, q)  # rows that do not fill the window yet
        inside = ramp * (prefix + ramp / 2.0) + (q - ramp) * w
        windowed = np.asarray(window) > 0
        short = inside / q + half
        mean = np.where(windowed, short + p.masked_fraction * np.maximum(mean - short, 0.0), mean)
        reach = np.minimum(w + span + KEY_BLOCK, all_keys)
        most = np.where(windowed, reach + p.masked_fraction * (all_keys - reach), most)
        pairs = np.where(windowed, np.minimum(inside + ramp / 2.0, pairs), pairs)
    mean = np.minimum(mean, most)
    if np.any(np.equal(causal, 0.0)):
        full = np.equal(causal, 0.0)
        mean = np.where(full, all_keys, mean)
        most = np.where(full, all_keys, most)
        pairs = np.where(full, q * keys, pairs)
    return mean, most, pairs


def _seconds_per_pair(
    p: PrefillAttentionParameters,
    device: HardwareProfile,
    head_dim: Array,
    v_dim: Array,
    element_bytes: Array,
) -> Array:
    """Seconds one SM needs for one query-key pair of one head."""
    step = HEAD_DIM_STEP
    padded = (np.ceil(head_dim / step) + np.ceil(v_dim / step)) * step
    rate: Array = tensor_peak(device, "bf16") * p.tensor_fraction / units(device)
    rate = rate * np.where(np.less(element_bytes, 1.5), p.fp8_ratio, 1.0)
    products = 2.0 * padded / rate * np.where(np.greater(head_dim, 128), p.wide_head_cost, 1.0)
    exponential = 1.0 / (p.exponentials_per_s * clock_ratio(device))
    return overlapped(products, exponential, p.unhidden_exponential)


#: Row tiles of known implementations, after their sources: FlashAttention-3 has tiles of 192 rows
#: for narrow heads, FlashInfer of 64 for wide ones; of those that do not pack, only
#: FlashAttention-2 turns the heads of a single query into rows: TensorRT-LLM's prompt kernel runs
#: one CTA per query head whatever the prompt.
STRUCTURES: dict[str, dict[str, float]] = {
    "fa2": {"tile_rows": 64.0, "packs_heads": 0.0},
    "fa3": {"tile_rows": 128.0, "packs_heads": 1.0, "slim_rows": 192.0},
    "fa4": {"tile_rows": 256.0, "packs_heads": 1.0, "fits_rows": 1.0},
    "trtllm": {"tile_rows": 256.0, "packs_heads": 0.0, "swaps_heads": 0.0},
    "flashinfer": {"tile_rows": 128.0, "packs_heads": 1.0, "fits_rows": 1.0, "deep_rows": 64.0},
}
USUAL_STRUCTURE = {
    "tile_rows": 128.0,
    "packs_heads": 1.0,
    "swaps_heads": 1.0,
    "fits_rows": 0.0,
    "slim_rows": 0.0,
    "deep_rows": 0.0,
}


def _time(
    parameters: PrefillAttentionParameters,
    device: HardwareProfile,
    shape: Shape,
    variant: str,
    cold: bool,
) -> Array:
    return prefill_attention_time_s(
        parameters,
        device,
        *(shape[name] for name in SHAPE[:6]),
        v_head_dim=shape.get("v_head_dim"),
        kv_len=shape.get("kv_len"),
        window=shape.get("window", 0.0),
        causal=shape.get("causal", 1.0),
        cold=cold,
    )


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    q = np.asarray(shape["q_len"], dtype=np.float64)
    window = np.asarray(shape.get("window", 0.0))
    w = np.where(window > 0, np.minimum(window, q), q)
    causal = w * (w + 1.0) / 2.0 + (q - w) * w
    pairs = np.where(np.equal(shape.get("causal", 1.0), 0.0), q * q, causal)
    width = shape["head_dim"] + shape.get("v_head_dim", shape["head_dim"])
    flops = 2.0 * shape["batch"] * shape["n_heads"] * width * pairs
    flops = flops * fp8_share(device, shape["element_bytes"])
    rows = shape["batch"] * q * width
    n_bytes = rows * (2.0 * shape["n_heads"] + shape["element_bytes"] * shape["n_kv_heads"])
    return Work(flops, tensor_peak(device, "bf16"), n_bytes)


def _structure(kernel: str, variant: str) -> dict[str, float]:
    known = USUAL_STRUCTURE | STRUCTURES.get(kernel_class(kernel), {})
    # Short prompts may go to the decode kernel, which packs.
    return known | {"packs_heads": 1.0} if "decode" in kernel.lower() else known


SHAPE = ("batch", "q_len", "n_heads", "n_kv_heads", "head_dim", "element_bytes", "window", "causal")
KIND = KernelKind(
    name="prefill_attention",
    parameters=PrefillAttentionParameters,
    shape=SHAPE,
    variants=("",),
    priors=lambda kernel, variant: PRIORS,
    structure=_structure,
    time_s=_time,
    work=_work,
)
