"""Seconds of one operation from curves measured on this very device.

A calibrated profile holds one curve per operation class and variant. Its name is
``<class>/<dtype>[/<parameter>=<value>]...``, where the class is the operation's own name if a
curve was measured for it, else its kind. ``y`` is seconds per unit of work at size ``x``, the
start of the kernel by the host included, measured with cold data (buffers that rotate through
more than the cache holds, as the weights and caches of a real pass do):

===========================  =========================  =====================  ================
class                        size ``x``                 unit of work           parameters
===========================  =========================  =====================  ================
gemm                         rows m                     FLOP (2 m n k)         n, k
prefill_attention            query tokens               FLOP of whole tiles    head_dim
decode_attention             KV bytes read              KV byte                head_dim, group
dequantised_attention        elements attended          element                head_dim, group
dequantise, quantise, ...    elements                   element                bits
norm_rope_activation         bytes moved                byte
stream (any other)           bytes moved                byte, plus ``dispatch``
===========================  =========================  =====================  ================

``group`` is query heads per KV head; ``stream`` and ``dispatch`` (seconds per launch, at x = 1)
have no dtype. Between sizes time per unit is interpolated in log-log space; between variants by
the inverse fourth power of the distance in octaves of their parameters (predicting a GEMV of a
left-out shape, the fourth power errs by 8 % in fp32 and 18 % in bf16, the second by 10 and 23).
Outside the measured sizes the end value holds and the result is marked. What is ignored: overlap (a
CPU has none), and that a working set smaller than the last-level cache may be warm.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from costmodel.hardware import Curve, HardwareProfile
from costmodel.kernels.prior import KernelTime, timed_flops
from costmodel.operation import Array, Operation, causal_pairs

#: Keys a block of the CPU flash-attention kernel covers (PyTorch,
#: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: kv_split_size 512).
CPU_KEY_BLOCK_TOKENS = 512.0
#: Parameters further than this many octaves from every measured variant are extrapolation.
FAR_OCTAVES = 1.5
#: Half-width of the interval nobody should claim to be below: two runs of the same point differ by
#: this much on a shared machine, whatever the spread inside one run.
NOISE_FRACTION = 0.08


class CurveTime(NamedTuple):
    """Seconds of one run, its relative half-width, and 1.0 where it extrapolates."""

    seconds: Array
    spread: float
    extrapolated: Array


class _Variant(NamedTuple):
    parameters: Mapping[str, float]
    curve: Curve


def curve_name(kind: str, dtype: str = "", **parameters: float) -> str:
    """Name of a curve: ``gemm/bf16/n=1536/k=2048``."""
    parts = [kind, *([dtype] if dtype else [])]
    return "/".join(parts + [f"{k}={v:g}" for k, v in sorted(parameters.items())])


def tiled_causal_pairs(n_queries: Array) -> Array:
    """Query-key pairs a CPU flash kernel works on: keys in whole blocks of 512, or all S of fewer.

    With f = floor(S / 512) full blocks: 512^2 f (f + 1) / 2 + (S - 512 f) S.
    """
    s = np.asarray(n_queries, dtype=np.float64)
    block = CPU_KEY_BLOCK_TOKENS
    full: Array = np.floor(s / block)
    pairs: Array = block * block * full * (full + 1) / 2 + (s - block * full) * s
    return pairs


def curve_time_s(operation: Operation, hardware: HardwareProfile) -> CurveTime | None:
    """Seconds of one run of ``operation``; None where the profile has no curve for it.

    The host's time to start the kernels is included: do not add launch overhead again.
    """
    if not hardware.curves or operation.kind in ("collective", "host_link"):
        return None
    for kind in (operation.name, operation.kind):
        variants = _variants(hardware, kind, operation.dtype)
        if variants:
            size, work, parameters = _size_and_work(operation)
            return _interpolated(variants, size, work, parameters)
    return _streamed(operation, hardware) if operation.kind == "elementwise" else None


def calibrated_time(operation: Operation, hardware: HardwareProfile) -> KernelTime | None:
    """Interval, parts and basis ("calibrated") of one run; None where there is no curve."""
    time = curve_time_s(operation, hardware)
    if time is None:
        return None
    flops = operation.counted_flops
    compute = flops / hardware.peak(operation.dtype) if np.any(flops) else 0.0
    memory = operation.moved_bytes / hardware.hbm_bytes_per_s
    scale = time.seconds / np.maximum(np.maximum(compute, memory), 1e-300)
    factor = 1.0 + max(time.spread, NOISE_FRACTION)
    return KernelTime(
        low_s=time.seconds / factor,
        mid_s=time.seconds,
        high_s=time.seconds * factor,
        compute_s=compute * scale,
        memory_s=memory * scale,
        launch_s=0.0,
        basis="calibrated",
        extrapolated=time.extrapolated,
    )


def _size_and_work(operation: Operation) -> tuple[Array, Array, dict[str, Array]]:
    """(x, work, parameters) of an operation, as the table in the module docstring says."""
    shape = operation.shape
    if operation.kind == "gemm":
        m, n, k = shape["m"], shape["n"], shape["k"]
        return m, 2.0 * m * n * k, {"n": n, "k": k}
    if operation.kind == "prefill_attention":
        s = shape["q_len"]
        tiles = tiled_causal_pairs(s) / np.maximum(causal_pairs(s), 1.0)
        return s, timed_flops(operation) * tiles, {"head_dim": shape["head_dim"]}
    if operation.kind == "decode_attention":
        heads = shape["n_kv_heads"]
        tokens = shape["batch"] * shape["kv_len"]
        elements = tokens * heads * (shape["head_dim"] + shape["v_head_dim"])
        parameters = {"head_dim": shape["head_dim"], "group": shape["n_heads"] / heads}
        size = elements if operation.name == "dequantised_attention" else shape["kv_bytes"]
        return size, size, parameters
    if "elements" in shape:
        bits = {"bits": shape["bits"]} if "bits" in shape else {}
        return shape["elements"], shape["elements"], bits
    return operation.moved_bytes, operation.moved_bytes, {}


def _variants(hardware: HardwareProfile, kind: str, dtype: str) -> list[_Variant]:
    prefix = f"{kind}/{dtype}"
    found = []
    for name, curve in hardware.curves.items():
        if name == prefix or name.startswith(f"{prefix}/"):
            pairs = (part.partition("=") for part in name[len(prefix) :].split("/") if part)
            found.append(_Variant({k: float(v) for k, _, v in pairs}, curve))
    return found


def _interpolated(
    variants: list[_Variant], size: Array, work: Array, parameters: Mapping[str, Array]
) -> CurveTime:
    """Geometric mean of the variants at ``size``, weighted by nearness."""
    distances = [_octaves(v.parameters, parameters) for v in variants]
    weights = [1.0 / (d**4 + 1e-9) for d in distances]
    total = sum(weights)
    log_size = np.log(np.maximum(size, 1e-300))
    log_unit: Array = np.float64(0.0)
    for variant, weight in zip(variants, weights, strict=True):
        x, y = np.log(variant.curve.x), np.log(variant.curve.y)
        log_unit = log_unit + weight / total * np.interp(log_size, x, y)
    low = min(v.curve.x[0] for v in variants)
    high = max(v.curve.x[-1] for v in variants)
    outside = np.logical_or(size < low, size > high) | (min(distances) > FAR_OCTAVES)
    spread = sum(w * v.curve.spread for v, w in zip(variants, weights, strict=True)) / total
    # No work takes no time and extrapolates nothing.
    return CurveTime(work * np.exp(log_unit), spread, np.where(work > 0, outside, 0.0))


def _octaves(measured: Mapping[str, float], wanted: Mapping[str, Array]) -> float:
    """Distance in octaves. Parameters are scalars (model dimensions), never sweep axes."""
    squares = [math.log2(float(wanted[k]) / v) ** 2 for k, v in measured.items() if k in wanted]
    return math.sqrt(sum(squares))


def _streamed(operation: Operation, hardware: HardwareProfile) -> CurveTime | None:
    """Bytes at the streaming rate of their own working set, and one dispatch per launch."""
    stream, dispatch = hardware.curves.get("stream"), hardware.curves.get("dispatch")
    if stream is None or dispatch is None:
        return None
    moved = operation.moved_bytes
    busy = _interpolated([_Variant({}, stream)], moved, moved, {})
    return busy._replace(seconds=busy.seconds + operation.launches * dispatch.y[0])
