"""Seconds of one operation from curves measured on this very device.

A calibrated profile holds one curve per operation class and variant. Its name is
``<class>[/<dtype>][/<parameter>=<value>]...``, where the class is the operation's own name if a
curve was measured for it, else its kind. ``y`` is seconds per unit of work at size ``x``, the
start of the kernel by the host included, measured with cold data (buffers that rotate through
more than the cache holds, as the weights and caches of a real pass do):

======================================  ========================  ==================  ==============
class                                   size ``x``                unit of work        parameters
======================================  ========================  ==================  ==============
gemm (also of experts, one by one)      rows m                    FLOP (2 m n k)      n, k
rglru_gates                             rows m                    FLOP                k, groups
prefill_attention                       query tokens              FLOP of whole tiles head_dim
windowed_attention                      keys of a masked block    FLOP of blocks      head_dim
banded_attention, score_pass,           score rows times keys     FLOP of blocks      head_dim
window_scores
decode_attention, scored_attention,     KV bytes read             KV byte             head_dim,
sink_attention                                                                        group
dequantised_attention                   elements attended         element             head_dim,
                                                                                      group
dequantise, quantise, ...               elements                  element             bits
ssd_chunk_scan, rglru_scan, ...         channels times tokens     channel and token   head_dim,
                                                                  (whole chunks)      d_state, chunk
selective_state_update, ..._step        state elements            state element       head_dim,
                                                                                      d_state
causal_conv1d                           elements                  element             kernel
select, update_and_evict                scores                    score
norm_rope_activation, with tanh-GELU    activation bytes          byte                blocks
norm_rope_activation_gelu
gather_kept, chunk_kda, ...             bytes moved               byte
stream (any other elementwise)          bytes moved               byte, plus
                                                                  ``dispatch``
======================================  ========================  ==================  ==============

``group`` is query heads per KV head; ``blocks`` are a layer's mixers and MLPs (each with a norm
and a residual sum, the MLPs with an activation); ``dispatch`` is seconds per launch, at x = 1.
Classes whose type does not matter have no dtype. Between sizes time per unit is interpolated in
log-log space; between variants by the inverse fourth power of the distance in octaves of their
parameters (predicting a GEMV of a left-out shape, the fourth power errs by 8 % in fp32 and 18 % in
bf16, the second by 10 and 23). Outside the measured sizes the end value holds and the result is
marked.
What is ignored: overlap (a CPU has none), and that a working set smaller than the last-level cache
may be warm.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodel.hardware import Curve, HardwareProfile
from costmodel.kernels.curve_sizes import Measured, measured, windowed
from costmodel.kernels.prior import KernelTime
from costmodel.operation import Array, Operation

#: Parameters further than this many octaves from every measured variant are extrapolation.
FAR_OCTAVES = 1.5
#: Half-width of the interval nobody should claim to be below: two runs of the same point differ by
#: this much on a shared machine, whatever the spread inside one run.
NOISE_FRACTION = 0.08


#: Which points of a sweep something holds for.
Mask = NDArray[np.bool_] | np.bool_ | bool


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


def curve_time_s(operation: Operation, hardware: HardwareProfile) -> CurveTime | None:
    """Seconds of one run of ``operation``; None where the profile has no curve for it.

    The host's time to start the kernels is included: do not add launch overhead again.
    """
    if not hardware.curves or operation.kind in ("collective", "host_link"):
        return None
    plain = next(filter(None, (_read(hardware, m, operation) for m in measured(operation))), None)
    if operation.kind == "prefill_attention":
        cut = windowed(operation)
        found = None if cut is None else _read(hardware, cut, operation)
        if found is not None:
            is_cut = operation.shape["q_len"] > operation.shape["window_tokens"]
            return found if plain is None else _where(is_cut, found, plain)
    if plain is None and operation.kind == "elementwise":
        return _streamed(operation, hardware)
    return plain


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


def _read(hardware: HardwareProfile, where: Measured, operation: Operation) -> CurveTime | None:
    """Time from the curves of one class, of the operation's dtype or of none."""
    variants = _variants(hardware, f"{where.kind}/{operation.dtype}") or _variants(
        hardware, where.kind
    )
    return _interpolated(variants, where) if variants else None


def _variants(hardware: HardwareProfile, prefix: str) -> list[_Variant]:
    found = []
    for name, curve in hardware.curves.items():
        parts = name[len(prefix) :].split("/")
        if name.startswith(prefix) and not parts[0] and all("=" in p for p in parts[1:]):
            pairs = (part.partition("=") for part in parts[1:])
            found.append(_Variant({k: float(v) for k, _, v in pairs}, curve))
    return found


def _where(condition: Mask, yes: CurveTime, no: CurveTime) -> CurveTime:
    return CurveTime(
        np.where(condition, yes.seconds, no.seconds),
        max(yes.spread, no.spread) if np.any(condition) else no.spread,
        np.where(condition, yes.extrapolated, no.extrapolated),
    )


def _interpolated(variants: list[_Variant], where: Measured) -> CurveTime:
    """Geometric mean of the variants at a size, weighted by nearness."""
    size, work = where.size, where.work
    distances = [_octaves(v.parameters, where.parameters) for v in variants]
    weights = [1.0 / (d**4 + 1e-9) for d in distances]
    total = sum(weights)
    log_size = np.log(np.maximum(size, 1e-300))
    log_unit: Array = np.float64(0.0)
    for variant, weight in zip(variants, weights, strict=True):
        x, y = np.log(variant.curve.x), np.log(variant.curve.y)
        log_unit = log_unit + weight / total * np.interp(log_size, x, y)
    low = min(v.curve.x[0] for v in variants)
    high = max(v.curve.x[-1] for v in variants)
    nearest: Array = functools.reduce(np.minimum, distances)
    outside = np.logical_or(size < low, size > high) | (nearest > FAR_OCTAVES)
    spreads = [np.mean(w / total) * v.curve.spread for v, w in zip(variants, weights, strict=True)]
    # No work takes no time and extrapolates nothing.
    return CurveTime(work * np.exp(log_unit), float(sum(spreads)), np.where(work > 0, outside, 0.0))


def _octaves(measured: Mapping[str, float], wanted: Mapping[str, Array]) -> Array:
    """Distance in octaves."""
    squares = [np.log2(wanted[k] / v) ** 2 for k, v in measured.items() if k in wanted]
    distance: Array = np.sqrt(sum(squares)) if squares else np.float64(0.0)
    return distance


def _streamed(operation: Operation, hardware: HardwareProfile) -> CurveTime | None:
    """Bytes at the streaming rate of their own working set, and one dispatch per launch."""
    stream, dispatch = hardware.curves.get("stream"), hardware.curves.get("dispatch")
    if stream is None or dispatch is None:
        return None
    moved = operation.moved_bytes
    busy = _interpolated([_Variant({}, stream)], Measured("stream", moved, moved, {}))
    return busy._replace(seconds=busy.seconds + operation.launches * dispatch.y[0])
