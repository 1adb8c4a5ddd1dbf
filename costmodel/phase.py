"""From the operations of a pass to its time, its bound and its totals.

A pass is the sum of its kernels. The host limits it when there is no captured graph and starting the
kernels takes longer than running them. Transfers over the host link overlap with the kernels in
an ideal implementation (prefetch) and queue behind them in a published one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.engines import Engine
from costmodel.hardware import HardwareProfile
from costmodel.kernels import KernelTime, time_operation
from costmodel.layout import total
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Level

#: What can bind a pass, in the order of ``PhaseTime.parts``.
BOUNDS = ("compute", "weight", "kv", "launch", "link")


@dataclass(frozen=True, slots=True, eq=False)
class PhaseTime:
    """Seconds of one pass and what they are spent on.

    parts   middle-estimate seconds by ``BOUNDS``; traffic between kernels (activations) counts as
            compute, because like compute it grows with the tokens worked on
    """

    low_s: Array
    mid_s: Array
    high_s: Array
    parts: tuple[Array, ...]
    bases: frozenset[str]
    extrapolated: Array

    def bound(self) -> NDArray[np.intp]:
        """Index into ``BOUNDS`` of the largest part; shape of the workload."""
        parts = np.broadcast_arrays(*self.parts)
        best = parts[0]
        index = np.zeros(best.shape, dtype=np.intp)
        for i, part in enumerate(parts[1:], start=1):
            larger = part > best
            index = np.where(larger, i, index)
            best = np.where(larger, part, best)
        return index


def phase_time(
    operations: Operations,
    hardware: HardwareProfile,
    engine: Engine,
    *,
    level: Level,
    graph: bool,
) -> PhaseTime:
    """Add up a pass. ``graph``: the pass is replayed from a captured graph."""
    zero: Array = np.float64(0.0)
    low, mid, high = zero, zero, zero
    link_low, link_mid, link_high = zero, zero, zero
    compute, weight, kv, launch, link = zero, zero, zero, zero, zero
    launches = zero
    extrapolated = zero
    bases: set[str] = set()
    for op in operations:
        t = time_operation(op, hardware)
        n = op.count
        bases.add(t.basis)
        extrapolated = np.maximum(extrapolated, t.extrapolated)
        launches = launches + n * op.launches
        launch = launch + n * t.launch_s
        if op.kind == "host_link":
            link_low, link_mid = link_low + n * t.low_s, link_mid + n * t.mid_s
            link_high = link_high + n * t.high_s
            continue
        low, mid, high = low + n * t.low_s, mid + n * t.mid_s, high + n * t.high_s
        link = link + n * t.link_s
        c, w, k = _split(op, t)
        compute, weight, kv = compute + n * c, weight + n * w, kv + n * k
    if level == "ideal":
        low, mid, high = np.maximum(low, link_low), np.maximum(mid, link_mid), high + link_high
    else:
        low, mid, high = low + link_low, mid + link_mid, high + link_high
    link = link + link_mid
    if not graph and not hardware.is_cpu:
        host = [launches * x for x in engine.host_launch_s]
        launch = np.maximum(launch, host[1])
        low, mid, high = (np.maximum(t, h) for t, h in zip((low, mid, high), host, strict=True))
    overhead = (0.0, 0.0, 0.0) if hardware.is_cpu else engine.step_overhead_s
    return PhaseTime(
        low + overhead[0],
        mid + overhead[1],
        high + overhead[2],
        (compute, weight, kv, launch + overhead[1], link),
        frozenset(bases),
        extrapolated,
    )


def _split(op: Operation, t: KernelTime) -> tuple[Array, Array, Array]:
    """Busy time of one run as (compute, weight, kv): all of it to compute where that is the longer
    side, otherwise by the bytes moved.
    """
    moved = op.moved_bytes
    if not np.any(moved):
        return t.compute_s, 0.0, 0.0
    compute_binds = t.compute_s > t.memory_s
    busy = np.where(compute_binds, 0.0, t.memory_s) / np.maximum(moved, 1e-300)
    compute = np.where(compute_binds, t.compute_s, busy * op.activation_bytes)
    return compute, busy * op.weight_bytes, busy * (op.state_bytes + op.workspace_bytes)


def roofline_s(operations: Operations, hardware: HardwareProfile, hbm_bytes: Array, tp: int) -> Array:
    """The bound nothing can beat: max(total FLOPs / peak, total bytes / bandwidth).

    ``operations`` are the whole model's (unsharded), so their useful FLOPs are divided by ``tp``;
    ``hbm_bytes`` are one GPU's. FLOPs of different compute types are each taken at their own peak.
    """
    by_dtype: dict[str, Array] = {}
    for op in operations:
        if np.any(op.flops):
            by_dtype[op.dtype] = by_dtype.get(op.dtype, 0.0) + op.count * op.flops
    compute: Array = np.float64(0.0)
    for dtype, flops in by_dtype.items():
        compute = compute + flops / (hardware.peak(dtype) * tp)
    return np.maximum(compute, hbm_bytes / hardware.hbm_bytes_per_s)


def hbm_bytes(operations: Operations) -> Array:
    """Bytes a pass must move through HBM."""
    return total(operations, lambda op: op.hbm_bytes)


def link_bytes(operations: Operations) -> Array:
    """Bytes a pass moves over the host link."""
    return total(operations, lambda op: op.link_bytes if op.kind == "host_link" else 0.0)
