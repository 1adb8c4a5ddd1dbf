"""Seconds of one decode step's attention over a KV cache, from physical parameters.

One query per sequence attends L = min(kv_len, window) cached tokens. Thread blocks (CTAs) are
units of work, not FLOPs: with ``g`` query heads per KV head, S SMs and kv = 2 L D e bytes per
sequence and KV head,

    units     U = batch * kv heads * ceil(g / 64)
    splits    s = clip(S o_s / U, 1, min(L / block, s_max))      the cache is split along L
    per CTA   c = kv / (s r) + t_cta
    compute   waves(U s / (S o)) c
    memory    batch * kv heads * kv * (miss / (e_b bw) + hit / (h cache))
    time      t0 + t_combine (1 - 1 / s) + longer + u shorter + queries and outputs

FlashAttention-2 (``swaps_heads`` 1) packs a group by swapping its heads into the query axis, which
only groups of several heads without a window allow. The others are not split: a long cache then
streams through one CTA per query head. And with several KV heads the swap is a copy that costs as
much as joining splits. fp8 caches add a start-up cost, and their CTAs stream at another rate
because they convert what they read.

FlashInfer runs groups below 4 of an unquantised cache in a kernel without tensor cores, whose CTAs
cost less (``plain_group``). Groups above 32 need a wider tile, and with it another kernel.

What is ignored: page tables, the append of the new token, tensor-core time (two FLOPs per byte
and query head: it shows only above some 64 query heads per KV head).
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
    limited,
    miss_fraction,
    overlapped,
    tensor_peak,
    units,
    waves,
)
from costmodel.operation import Array

#: Query heads of one KV head that one CTA packs into a tile of rows.
PACKED_HEADS = 64.0
#: Groups above this run in a kernel of wider tiles.
NARROW_HEADS = 32.0
#: FlashInfer's smallest group on tensor cores.
FLASHINFER_GROUP = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAttentionParameters:
    """One kernel family of decode attention.

    launch_s             start of the kernel, t0
    bandwidth_fraction   attained share of DRAM bandwidth, e_b
    stream_bytes_per_s   what one CTA streams at 1.8 GHz, r
    fp8_stream_ratio     the same for an fp8 cache, against r
    cta_s                fixed cost of a CTA, t_cta
    wave_rounding        0 perfect sharing .. 1 whole waves
    ctas_per_unit        CTAs resident on one SM, o
    split_ctas_per_unit  CTAs per SM the splits aim at, o_s
    max_splits           most splits of one cache, s_max
    block_tokens         fewest tokens of a split
    combine_s            kernel that joins the splits
    fp8_s                extra start of an fp8 cache
    cache_rate_fraction  attained share of the last-level cache's rate, h
    cache_fraction       share of the last-level cache that holds a replayed KV cache
    unhidden_fraction    share of the shorter activity that nothing hides, u
    wide_s               extra start where more than 32 query heads share a KV head
    plain_cta_ratio      cost of a CTA of groups below ``plain_group``, against t_cta
    swaps_heads          1: packs a group's heads as FlashAttention-2 does; 0: in the kernel
    plain_group          groups smaller than this run without tensor cores, unless in fp8
    """

    launch_s: float
    bandwidth_fraction: float
    stream_bytes_per_s: float
    fp8_stream_ratio: float
    cta_s: float
    wave_rounding: float
    ctas_per_unit: float
    split_ctas_per_unit: float
    max_splits: float
    block_tokens: float
    combine_s: float
    fp8_s: float
    cache_rate_fraction: float
    cache_fraction: float
    unhidden_fraction: float
    wide_s: float = 0.0
    plain_cta_ratio: float = 1.0
    swaps_heads: float = 0.0
    plain_group: float = 0.0


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(8e-6, 0.4, 1e-6, 4e-5, "start of the kernel"),
    "bandwidth_fraction": Prior(0.93, 0.05, 0.5, 1.0, "attained share of DRAM bandwidth"),
    "stream_bytes_per_s": Prior(6e10, 0.7, 2e9, 5e11, "one CTA's stream at 1.8 GHz"),
    "fp8_stream_ratio": Prior(0.6, 0.5, 0.1, 2.0, "fp8 stream against that"),
    "cta_s": Prior(2.2e-6, 0.6, 1e-8, 2e-5, "fixed cost of a CTA"),
    "wave_rounding": Prior(0.4, 0.5, 0.02, 1.0, "0 perfect sharing, 1 whole waves"),
    "ctas_per_unit": Prior(1.2, 0.4, 0.5, 8.0, "CTAs resident on one SM"),
    "split_ctas_per_unit": Prior(1.0, 0.3, 0.3, 4.0, "CTAs per SM the splits aim at"),
    "max_splits": Prior(30.0, 0.6, 4.0, 256.0, "most splits of one cache"),
    "block_tokens": Prior(120.0, 0.5, 32.0, 1024.0, "fewest tokens of a split"),
    "combine_s": Prior(2e-6, 0.5, 1e-8, 1.2e-5, "kernel that joins the splits"),
    "fp8_s": Prior(1.5e-6, 0.8, 1e-9, 1e-5, "extra start of an fp8 cache"),
    "cache_rate_fraction": Prior(0.3, 0.6, 0.03, 1.0, "attained share of the cache's rate"),
    "cache_fraction": Prior(0.8, 0.3, 0.1, 1.5, "cache share that holds a replayed KV cache"),
    "unhidden_fraction": Prior(0.3, 0.5, 0.001, 1.0, "share of the shorter activity not hidden"),
    "wide_s": Prior(1e-6, 0.8, 1e-9, 1e-5, "extra start of groups above 32"),
}
#: FlashInfer has a second kernel.
PLAIN_PRIORS = PRIORS | {
    "plain_cta_ratio": Prior(0.6, 0.6, 0.02, 2.0, "a CTA of small groups against others"),
}


def decode_attention_time_s(
    parameters: DecodeAttentionParameters,
    device: HardwareProfile,
    batch: Array,
    kv_len: Array,
    n_heads: Array,
    n_kv_heads: Array,
    head_dim: Array,
    element_bytes: Array = 2.0,
    *,
    v_head_dim: Array | None = None,
    window: Array = 0.0,
    cold: bool = True,
) -> Array:
    """Seconds of one layer's decode attention. Shape: that of the arguments broadcast.

    ``element_bytes`` is of the stored cache (2 or 1); ``v_head_dim`` defaults to ``head_dim``;
    ``window`` 0 means none. ``cold`` False predicts a row of a replayed table.
    """
    p = parameters
    tokens = np.asarray(kv_len, dtype=np.float64)
    if np.any(window):
        tokens = np.where(np.asarray(window) > 0, np.minimum(tokens, window), tokens)
    sharing = group = np.asarray(n_heads, dtype=np.float64) / n_kv_heads
    packs = np.ceil(group / PACKED_HEADS)
    if p.swaps_heads and np.any(window):
        packs = np.where(np.asarray(window) > 0, group, packs)
        group = np.where(np.asarray(window) > 0, 1.0, group)
    n_units = np.asarray(batch, dtype=np.float64) * (n_kv_heads * packs)
    width = head_dim + (head_dim if v_head_dim is None else v_head_dim)
    kv_bytes = tokens * (width * np.asarray(element_bytes, dtype=np.float64))
    total_bytes = batch * n_kv_heads * kv_bytes
    is_fp8 = np.less(element_bytes, 1.5)
    splits, joined = _splits(p, device, n_units, tokens, (group, n_kv_heads))

    stream = p.stream_bytes_per_s * clock_ratio(device) * np.where(is_fp8, p.fp8_stream_ratio, 1.0)
    sms = units(device)
    cta_s: Array = p.cta_s
    if p.plain_group:
        plain = np.less(group, p.plain_group) & ~is_fp8
        cta_s = np.where(plain, p.plain_cta_ratio * p.cta_s, p.cta_s)
    rounds = waves(n_units * splits / (sms * p.ctas_per_unit), p.wave_rounding)
    ctas = rounds * (kv_bytes / (splits * stream) + cta_s)

    bandwidth = device.hbm_bytes_per_s
    miss: Array = np.float64(1.0)
    if not cold:
        miss = miss_fraction(total_bytes, p.cache_fraction * cache_bytes(device))
    cache_rate = p.cache_rate_fraction * cache_bytes_per_s(device)
    memory = total_bytes * (miss / (p.bandwidth_fraction * bandwidth) + (1.0 - miss) / cache_rate)
    # Queries and outputs, or the fp32 partial outputs of the splits, stay in the cache.
    row_s = n_heads * (width / 2.0) * (4.0 / cache_rate)
    rows = batch * row_s * splits
    start: Array = p.launch_s
    if np.any(np.greater(sharing, NARROW_HEADS)):
        start = np.where(np.greater(sharing, NARROW_HEADS), p.launch_s + p.wide_s, p.launch_s)
    seconds = (
        start
        + p.combine_s * joined
        + np.where(is_fp8, p.fp8_s, 0.0)
        + overlapped(ctas, memory, p.unhidden_fraction)
        + rows
    )
    flops = batch * tokens * (2.0 * n_heads * width)
    return limited(seconds, flops, tensor_peak(device, "bf16"), total_bytes, device, cold)


def _splits(
    p: DecodeAttentionParameters,
    device: HardwareProfile,
    n_units: Array,
    tokens: Array,
    heads: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Splits per cache, and the share of the joining kernel's cost that is due.

    1 - 1 / s rather than a step at s > 1, so that no time falls as a batch grows. ``heads`` are
    query heads per KV head, and KV heads.
    """
    wanted = np.minimum(units(device) * p.split_ctas_per_unit / n_units, tokens / p.block_tokens)
    splits = np.maximum(np.minimum(wanted, p.max_splits), 1.0)
    if not p.swaps_heads:
        return splits, 1.0 - 1.0 / splits
    group, kv_heads = heads
    swapped = np.greater(group, 1.0)
    splits = np.where(swapped, splits, 1.0)
    copied = swapped & np.greater(kv_heads, 1.0)
    return splits, np.where(copied, 1.0, 1.0 - 1.0 / splits)


def _time(
    parameters: DecodeAttentionParameters,
    device: HardwareProfile,
    shape: Shape,
    variant: str,
    cold: bool,
) -> Array:
    return decode_attention_time_s(
        parameters,
        device,
        *(shape[name] for name in SHAPE[:6]),
        v_head_dim=shape.get("v_head_dim"),
        window=shape.get("window", 0.0),
        cold=cold,
    )


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    window = np.asarray(shape.get("window", 0.0))
    tokens = np.where(window > 0, np.minimum(shape["kv_len"], window), shape["kv_len"])
    width = shape["head_dim"] + shape.get("v_head_dim", shape["head_dim"])
    pairs = shape["batch"] * tokens
    n_bytes = pairs * shape["n_kv_heads"] * width * shape["element_bytes"]
    flops = 2.0 * pairs * shape["n_heads"] * width
    return Work(flops, tensor_peak(device, "bf16"), n_bytes)


def _structure(kernel: str, variant: str) -> dict[str, float]:
    known = kernel_class(kernel)
    plain_group = FLASHINFER_GROUP if known == "flashinfer" else 0.0
    return {"swaps_heads": float(known == "fa2"), "plain_group": plain_group}


def _priors(kernel: str, variant: str) -> dict[str, Prior]:
    return PLAIN_PRIORS if kernel_class(kernel) == "flashinfer" else PRIORS


SHAPE = ("batch", "kv_len", "n_heads", "n_kv_heads", "head_dim", "element_bytes", "window")
KIND = KernelKind(
    name="decode_attention",
    parameters=DecodeAttentionParameters,
    shape=SHAPE,
    variants=("",),
    priors=_priors,
    structure=_structure,
    time_s=_time,
    work=_work,
)
