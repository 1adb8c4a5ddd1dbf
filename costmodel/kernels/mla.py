"""Seconds of multi-head latent attention, from physical parameters.

Decode: every head attends one shared latent of 512 + 64 elements per token, so the cache is read
once for a tile of heads and the tensor cores matter: per CTA and token max(576 e / r,
2 R (576 + 512) / rate) with R rows of heads. The rest is as in decode attention.

What differs between kernels is structure, known from their sources rather than fitted:

FlashAttention-3 (``converts_cache``)
    has no fp8 form of this width. SGLang converts an fp8 cache to bf16 as a whole before every
    call, one element after another, and then reads it in bf16.
TensorRT-LLM (``narrow_tiles``)
    up to 32 heads, and calls that would leave SMs idle, run in tiles of 16 heads, each of which
    reads the cache; more in tiles of 64, of which 128 heads make a pair of CTAs that share what
    they read.

Prefill: either expanded (192-wide keys and 128-wide values per head) or, in some kernels,
absorbed: the decode form over a prompt, 3.4 times the FLOPs (``absorbed`` 1), in tiles of 64 rows.
The rest is as in prefill attention. SGLang's FlashAttention-3 was measured absorbed; its engine, as
vLLM, expands prompts without a cached prefix, so operations ask for that form (``absorbed`` 0 in
the shape) and such a family answers with its rates and the tiles of the expanded one.

What is ignored: the up-projections around it, which are dense products of their own.
"""

import math
from dataclasses import dataclass, replace

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
from costmodel.kernels.prefill_attention import PRIORS as PREFILL_PRIORS
from costmodel.kernels.prefill_attention import (
    PrefillAttentionParameters,
    prefill_attention_time_s,
)
from costmodel.operation import Array

#: Heads one CTA takes, and the least rows an instruction needs.
PACKED_HEADS = 64.0
MIN_ROWS = 16.0
#: TensorRT-LLM's narrow tile: always up to this many heads; else where as many CTAs as that fit the
#: SMs at once, each with at most so many tokens, cut no finer than ``NARROW_SPLIT_TOKENS``.
NARROW_ROWS = 16.0
NARROW_HEADS = 32.0
NARROW_CTA_TOKENS = 1024.0
NARROW_SPLIT_TOKENS = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaDecodeParameters:
    """One kernel family of latent decode attention.

    launch_s             start of the kernel
    bandwidth_fraction   attained share of DRAM bandwidth
    tensor_fraction      attained share of the dense peak
    stream_bytes_per_s   what one CTA streams at 1.8 GHz
    cta_s                fixed cost of a CTA
    wave_rounding        0 perfect sharing .. 1 whole waves
    ctas_per_unit        CTAs resident on one SM, and what the splits aim at
    max_splits           most splits of one cache
    block_tokens         fewest tokens of a split
    combine_s            kernel that joins the splits
    cache_rate_fraction  attained share of the last-level cache's rate
    cache_fraction       share of the last-level cache that holds a replayed KV cache
    unhidden_fraction    share of the shorter activity that nothing hides
    fp8_s                extra start with an fp8 cache
    fp8_ratio            speed of the products with an fp8 cache, against bf16
    fp8_stream_ratio     what one CTA streams of an fp8 cache, against bf16
    convert_per_s        elements that one SM converts per second at 1.8 GHz
    converts_cache       1: converts a whole fp8 cache first, and then runs as in bf16
    narrow_tiles         1: few heads run in tiles of 16, 128 heads in pairs of CTAs
    """

    launch_s: float
    bandwidth_fraction: float
    tensor_fraction: float
    stream_bytes_per_s: float
    cta_s: float
    wave_rounding: float
    ctas_per_unit: float
    max_splits: float
    block_tokens: float
    combine_s: float
    cache_rate_fraction: float
    cache_fraction: float
    unhidden_fraction: float
    fp8_s: float = 0.0
    fp8_ratio: float = 1.0
    fp8_stream_ratio: float = 1.0
    convert_per_s: float = 8e9
    converts_cache: float = 0.0
    narrow_tiles: float = 0.0


DECODE_PRIORS: dict[str, Prior] = {
    "launch_s": Prior(9e-6, 0.5, 1e-6, 5e-5, "start of the kernel"),
    "bandwidth_fraction": Prior(0.9, 0.1, 0.3, 1.0, "attained share of DRAM bandwidth"),
    "tensor_fraction": Prior(0.6, 0.3, 0.1, 1.0, "attained share of the dense peak"),
    "stream_bytes_per_s": Prior(6e10, 0.7, 2e9, 5e11, "one CTA's stream at 1.8 GHz"),
    "cta_s": Prior(2.5e-6, 0.6, 1e-8, 2e-5, "fixed cost of a CTA"),
    "wave_rounding": Prior(0.4, 0.5, 0.02, 1.0, "0 perfect sharing, 1 whole waves"),
    "ctas_per_unit": Prior(1.0, 0.3, 0.3, 4.0, "CTAs resident on one SM"),
    "max_splits": Prior(30.0, 0.6, 4.0, 256.0, "most splits of one cache"),
    "block_tokens": Prior(120.0, 0.5, 32.0, 1024.0, "fewest tokens of a split"),
    "combine_s": Prior(2e-6, 0.6, 1e-8, 2e-5, "kernel that joins the splits"),
    "cache_rate_fraction": Prior(0.3, 0.6, 0.03, 1.0, "attained share of the cache's rate"),
    "cache_fraction": Prior(0.8, 0.3, 0.1, 1.5, "cache share that holds a replayed KV cache"),
    "unhidden_fraction": Prior(0.3, 0.5, 0.001, 1.0, "share of the shorter activity not hidden"),
    "fp8_s": Prior(2e-6, 0.8, 1e-9, 2e-5, "extra start with an fp8 cache"),
}
#: Kernels that read an fp8 cache as it is, and kernels that convert it first: at some 30
#: instructions an element, an SM's 128 lanes convert 8e9 a second.
NATIVE_PRIORS = DECODE_PRIORS | {
    "fp8_ratio": Prior(1.15, 0.3, 0.3, 2.0, "speed of the products with fp8 against bf16"),
    "fp8_stream_ratio": Prior(1.0, 0.5, 0.1, 2.0, "fp8 stream against bf16"),
}
CONVERTING_PRIORS = DECODE_PRIORS | {
    "convert_per_s": Prior(8e9, 0.7, 1e8, 1e11, "elements an SM converts at 1.8 GHz"),
}


def mla_decode_time_s(
    parameters: MlaDecodeParameters,
    device: HardwareProfile,
    batch: Array,
    kv_len: Array,
    n_heads: Array,
    element_bytes: Array = 2.0,
    *,
    latent_dim: float = 512.0,
    rope_dim: float = 64.0,
    cold: bool = True,
) -> Array:
    """Seconds of one layer's latent decode attention. Shape: that of the arguments broadcast.

    ``element_bytes`` is of the stored cache (2 or 1).
    """
    p = parameters
    tokens = np.asarray(kv_len, dtype=np.float64)
    heads = np.asarray(n_heads, dtype=np.float64)
    key_dim = latent_dim + rope_dim
    peak = tensor_peak(device, "bf16")
    sms, clock = units(device), clock_ratio(device)
    is_fp8 = np.less(element_bytes, 1.5)
    stored = key_dim * np.asarray(element_bytes, dtype=np.float64)
    read: Array = np.maximum(stored, 2.0 * key_dim) if p.converts_cache else stored
    tile, sharers = _head_tiles(p, sms, batch, tokens, heads)
    n_units = batch * np.ceil(heads / tile)
    wanted = np.minimum(sms * p.ctas_per_unit / n_units, tokens / p.block_tokens)
    splits = np.maximum(np.minimum(wanted, p.max_splits), 1.0)
    rows = np.minimum(np.ceil(heads / MIN_ROWS) * MIN_ROWS, tile)
    stream = read / (sharers * p.stream_bytes_per_s * clock)
    products = 2.0 * rows * (key_dim + latent_dim) * sms / (peak * p.tensor_fraction)
    if np.any(is_fp8) and not p.converts_cache:
        stream = np.where(is_fp8, stream / p.fp8_stream_ratio, stream)
        products = np.where(is_fp8, products / p.fp8_ratio, products)
    rounds = waves(n_units * splits / (sms * p.ctas_per_unit), p.wave_rounding)
    ctas = rounds * (tokens / splits * np.maximum(stream, products) + p.cta_s)
    cached = batch * tokens
    total_bytes = cached * read
    bandwidth = device.hbm_bytes_per_s
    miss: Array = np.float64(1.0)
    if not cold:
        miss = miss_fraction(total_bytes, p.cache_fraction * cache_bytes(device))
    cache_rate = p.cache_rate_fraction * cache_bytes_per_s(device)
    memory = total_bytes * (miss / (p.bandwidth_fraction * bandwidth) + (1.0 - miss) / cache_rate)
    outputs = batch * heads * latent_dim * splits * (4.0 / cache_rate)
    seconds = (
        p.launch_s
        + p.combine_s * (1.0 - 1.0 / splits)
        + overlapped(ctas, memory, p.unhidden_fraction)
        + outputs
    )
    if np.any(is_fp8):
        extra: Array = np.float64(p.fp8_s)
        if p.converts_cache:
            extra = extra + cached * (key_dim / (p.convert_per_s * clock * sms))
        seconds = seconds + np.where(is_fp8, extra, 0.0)
    flops = 2.0 * heads * cached * (key_dim + latent_dim)
    return limited(seconds, flops, peak, cached * stored, device, cold)


def _head_tiles(
    p: MlaDecodeParameters, sms: float, batch: Array, tokens: Array, heads: Array
) -> tuple[Array, Array]:
    """Heads of a tile, and the CTAs that share what they read.

    The choice is TensorRT-LLM's (``selectMlaGenerationKernel`` in FlashInfer's fmhaKernels.cuh).
    """
    if not p.narrow_tiles:
        return np.float64(PACKED_HEADS), np.float64(1.0)
    ctas = batch * np.ceil(heads / NARROW_ROWS)
    most = np.maximum(tokens / NARROW_SPLIT_TOKENS, 1.0)
    per_cta = tokens / np.minimum(np.maximum(sms / ctas, 1.0), most)
    narrow = (heads <= NARROW_HEADS) | ((ctas <= sms) & (per_cta <= NARROW_CTA_TOKENS))
    pairs = ~narrow & (heads > PACKED_HEADS)
    return np.where(narrow, NARROW_ROWS, PACKED_HEADS), np.where(pairs, 2.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaPrefillParameters(PrefillAttentionParameters):
    """Prefill attention's parameters, and whether the kernel runs the absorbed form."""

    absorbed: float = 0.0


def mla_prefill_time_s(
    parameters: MlaPrefillParameters,
    device: HardwareProfile,
    batch: Array,
    q_len: Array,
    n_heads: Array,
    element_bytes: Array = 2.0,
    *,
    key_dim: float = 192.0,
    value_dim: float = 128.0,
    latent_dim: float = 512.0,
    rope_dim: float = 64.0,
    kv_len: Array | None = None,
    cold: bool = True,
) -> Array:
    """Seconds of one layer's latent prefill attention. Shape: that of the arguments broadcast."""
    heads = np.asarray(n_heads, dtype=np.float64)
    dims = (key_dim, value_dim)
    kv_heads: Array = heads
    if parameters.absorbed:
        dims, kv_heads = (latent_dim + rope_dim, latent_dim), np.float64(1.0)
    return prefill_attention_time_s(
        parameters,
        device,
        batch,
        q_len,
        heads,
        kv_heads,
        dims[0],
        element_bytes,
        v_head_dim=dims[1],
        kv_len=kv_len,
        cold=cold,
    )


def _decode_time(
    parameters: MlaDecodeParameters,
    device: HardwareProfile,
    shape: Shape,
    variant: str,
    cold: bool,
) -> Array:
    args = (shape[name] for name in DECODE_SHAPE)
    return mla_decode_time_s(parameters, device, *args, cold=cold)


def _decode_work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    pairs = shape["batch"] * np.asarray(shape["kv_len"], dtype=np.float64)
    flops = 2.0 * pairs * shape["n_heads"] * (576.0 + 512.0)
    return Work(flops, tensor_peak(device, "bf16"), pairs * 576.0 * shape["element_bytes"])


def expanded(parameters: MlaPrefillParameters) -> MlaPrefillParameters:
    """What a kernel that absorbs takes for expanded keys and values, one KV head per query head.

    Its rates and fixed times stay; its tiles are those of any prompt, and no keys or values are
    written away, since engines cache the latents.
    """
    return replace(
        parameters,
        absorbed=0.0,
        packs_heads=0.0,
        tile_rows=EXPANDED_TILE_ROWS,
        append_fraction=math.inf,
    )


def _prefill_time(
    parameters: MlaPrefillParameters,
    device: HardwareProfile,
    shape: Shape,
    variant: str,
    cold: bool,
) -> Array:
    if parameters.absorbed and not shape.get("absorbed", 1.0):
        parameters = expanded(parameters)
    args = (shape[name] for name in PREFILL_SHAPE)
    return mla_prefill_time_s(parameters, device, *args, cold=cold)


def _prefill_work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    q = np.asarray(shape["q_len"], dtype=np.float64)
    flops = 2.0 * shape["batch"] * shape["n_heads"] * (192.0 + 128.0) * q * (q + 1.0) / 2.0
    flops = flops * fp8_share(device, shape["element_bytes"])
    n_bytes = shape["batch"] * q * (shape["n_heads"] * (192.0 + 128.0) * 2.0 + 576.0 * 2.0)
    return Work(flops, tensor_peak(device, "bf16"), n_bytes)


#: Rows of a tile of the kernels known: FlashAttention-3's at values of 512; and at values of 128.
PREFILL_TILE_ROWS = {"fa3": 64.0, "trtllm": 256.0}
EXPANDED_TILE_ROWS = 128.0


def _prefill_structure(kernel: str, variant: str) -> dict[str, float]:
    known = kernel_class(kernel)
    absorbs = float(known == "fa3")
    return {
        "tile_rows": PREFILL_TILE_ROWS.get(known, 128.0),
        "packs_heads": absorbs,
        "fits_rows": 0.0,
        "absorbed": absorbs,
    }


def _decode_structure(kernel: str, variant: str) -> dict[str, float]:
    known = kernel_class(kernel)
    return {"converts_cache": float(known == "fa3"), "narrow_tiles": float(known == "trtllm")}


def _decode_priors(kernel: str, variant: str) -> dict[str, Prior]:
    return CONVERTING_PRIORS if kernel_class(kernel) == "fa3" else NATIVE_PRIORS


DECODE_SHAPE = ("batch", "kv_len", "n_heads", "element_bytes")
PREFILL_SHAPE = ("batch", "q_len", "n_heads", "element_bytes")
DECODE_KIND = KernelKind(
    name="mla_decode_attention",
    parameters=MlaDecodeParameters,
    shape=DECODE_SHAPE,
    variants=("",),
    priors=_decode_priors,
    structure=_decode_structure,
    time_s=_decode_time,
    work=_decode_work,
)
PREFILL_KIND = KernelKind(
    name="mla_prefill_attention",
    parameters=MlaPrefillParameters,
    shape=PREFILL_SHAPE,
    variants=("",),
    priors=lambda kernel, variant: PREFILL_PRIORS,
    structure=_prefill_structure,
    time_s=_prefill_time,
    work=_prefill_work,
)
