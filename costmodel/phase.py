"""From the operations of a pass to its time, its bound and its totals.

A pass is the sum of its kernels. The host limits it when there is no captured graph and starting
the kernels takes longer than running them. Transfers over the host link overlap with the kernels
in an ideal implementation (prefetch) and queue behind them in a published one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from costmodel.engines import Engine
from costmodel.hardware import HardwareProfile
from costmodel.kernels import KernelTime, time_operation
from costmodel.layout import total
from costmodel.operation import Array, Operation, Operations, added, some
from costmodel.workload import Level

#: What can bind a pass, in the order of ``PhaseTime.parts``.
BOUNDS = ("compute", "weight", "kv", "launch", "link")


@dataclass(frozen=True, slots=True, eq=False)
class PhaseTime:
    """Seconds of one pass and what they are spent on.

    bases   seconds of all points together by the basis of the operation they are spent in
    parts   middle-estimate seconds by ``BOUNDS``; traffic between kernels (activations) counts as
            compute, because like compute it grows with the tokens worked on
    unfitted  why operations in it, however small, rest on a prior though they look like others
    """

    low_s: Array
    mid_s: Array
    high_s: Array
    parts: tuple[Array, ...]
    bases: Mapping[str, float]
    extrapolated: Array
    unfitted: frozenset[str] = frozenset()

    def anchored(self, factor: float) -> "PhaseTime":
        """All of it times ``factor``, what a run took over what was predicted for it."""
        return PhaseTime(
            low_s=self.low_s * factor,
            mid_s=self.mid_s * factor,
            high_s=self.high_s * factor,
            parts=tuple(part * factor for part in self.parts),
            bases={"anchored": factor * sum(self.bases.values())},
            extrapolated=self.extrapolated,
        )

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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Busy:
    """Seconds of operations added up, before overlap and host are considered; adds to others.

    ``low_s``, ``mid_s``, ``high_s`` are of kernels, ``link_*`` of the host link; ``parts`` as in
    ``PhaseTime``; ``host_waits`` is 1 where every layer makes the host wait for a result.
    """

    low_s: Array = 0.0
    mid_s: Array = 0.0
    high_s: Array = 0.0
    link_low_s: Array = 0.0
    link_mid_s: Array = 0.0
    link_high_s: Array = 0.0
    parts: tuple[Array, ...] = (0.0,) * len(BOUNDS)
    launches: Array = 0.0
    host_waits: Array = 0.0
    extrapolated: Array = 0.0
    bases: Mapping[str, float] = field(default_factory=dict)
    unfitted: frozenset[str] = frozenset()

    def __add__(self, other: "Busy") -> "Busy":
        bases = dict(self.bases)
        for name, seconds in other.bases.items():
            bases[name] = bases.get(name, 0.0) + seconds
        return Busy(
            **{name: getattr(self, name) + getattr(other, name) for name in _ADDED},
            parts=tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)),
            host_waits=np.maximum(self.host_waits, other.host_waits),
            extrapolated=np.maximum(self.extrapolated, other.extrapolated),
            bases=bases,
            unfitted=self.unfitted | other.unfitted,
        )

    def take(self, index: NDArray[np.intp], share: float = 1.0) -> "Busy":
        """The points of ``index``; ``share`` of the seconds by basis."""
        return Busy(
            **{name: _taken(getattr(self, name), index) for name in _ADDED},
            parts=tuple(_taken(p, index) for p in self.parts),
            host_waits=_taken(self.host_waits, index),
            extrapolated=_taken(self.extrapolated, index),
            bases={b: share * seconds for b, seconds in self.bases.items()},
            unfitted=self.unfitted,
        )


_ADDED = (*("low_s", "mid_s", "high_s", "link_low_s", "link_mid_s", "link_high_s", "launches"),)


def _taken(value: Array, index: NDArray[np.intp]) -> Array:
    return value[index] if isinstance(value, np.ndarray) and value.ndim else value


def middle_of(operations: Operations, hardware: HardwareProfile, engine: Engine) -> Busy:
    """The middle estimate of ``busy_of`` alone: no interval, no parts, no bases."""
    mid: Array = np.float64(0.0)
    link_mid: Array = np.float64(0.0)
    launches: Array = np.float64(0.0)
    host_waits: Array = np.float64(0.0)
    for op in operations:
        t = time_operation(op, hardware, engine.kernels, engine.in_situ, middle_only=True)
        launches = _more(launches, op.count, op.launches)
        host_waits = _waiting(host_waits, op)
        if op.kind == "host_link":
            link_mid = _more(link_mid, op.count, t.mid_s)
        else:
            mid = _more(mid, op.count, t.mid_s)
    return Busy(mid_s=mid, link_mid_s=link_mid, launches=launches, host_waits=host_waits)


def busy_of(operations: Operations, hardware: HardwareProfile, engine: Engine) -> Busy:
    """Time every operation and add up."""
    zero: Array = np.float64(0.0)
    low, mid, high = zero, zero, zero
    link_low, link_mid, link_high = zero, zero, zero
    compute, weight, kv, launch, link = zero, zero, zero, zero, zero
    launches = zero
    extrapolated, host_waits = zero, zero
    bases: dict[str, float] = {}
    unfitted: set[str] = set()
    for op in operations:
        t = time_operation(op, hardware, engine.kernels, engine.in_situ)
        if (op.unfitted or op.kernel) and t.basis == "prior" and some(op.count):
            unfitted.add(op.unfitted or f"lccost's step {op.kernel} has no records near this GPU")
        n = op.count
        mid_s = n * t.mid_s
        bases[t.basis] = bases.get(t.basis, 0.0) + float(np.sum(mid_s))
        if some(t.extrapolated):
            runs = np.where(np.asarray(n) > 0.0, t.extrapolated, 0.0)
            extrapolated = np.maximum(extrapolated, runs)
        launches = _more(launches, n, op.launches)
        host_waits = _waiting(host_waits, op)
        launch = _more(launch, n, t.launch_s)
        if op.kind == "host_link":
            link_low, link_mid = _more(link_low, n, t.low_s), link_mid + mid_s
            link_high = _more(link_high, n, t.high_s)
            continue
        low, mid, high = _more(low, n, t.low_s), mid + mid_s, _more(high, n, t.high_s)
        link = _more(link, n, t.link_s)
        c, w, k = _split(op, t)
        compute, weight, kv = _more(compute, n, c), _more(weight, n, w), _more(kv, n, k)
    return Busy(
        low_s=low,
        mid_s=mid,
        high_s=high,
        link_low_s=link_low,
        link_mid_s=link_mid,
        link_high_s=link_high,
        parts=(compute, weight, kv, launch, link + link_mid),
        launches=launches,
        host_waits=host_waits,
        extrapolated=extrapolated,
        bases=bases,
        unfitted=frozenset(unfitted),
    )


def _more(total: Array, count: Array, seconds: Array) -> Array:
    """``total + count * seconds``."""
    if not isinstance(seconds, np.ndarray) and seconds == 0.0:
        return total
    more: Array = count * seconds
    if isinstance(more, np.ndarray) and np.shape(total) in ((), more.shape):
        more += total
        return more
    return total + more


def _waiting(host_waits: Array, op: Operation) -> Array:
    if not op.host_waits:
        return host_waits
    waits: Array = np.maximum(host_waits, np.where(np.asarray(op.count) > 0, 1.0, 0.0))
    return waits


def overhead_s(
    engine: Engine, *, n_layers: int, first_token: bool = False
) -> tuple[float, float, float]:
    """Seconds (low, mid, high) of a pass that no kernel explains: the host's work per step, and in
    passes made of fitted kernels the gaps between them and what a first token takes besides. The
    factors around such passes are around all of it.
    """
    low, mid, high = engine.step_overhead_s
    known = engine.in_situ
    if known is None:
        return low, mid, high
    host = known.step_s if engine.decode_graph else mid
    mid = host + n_layers * known.layer_s + (known.first_token_s if first_token else 0.0)
    low_factor, high_factor = known.interval()
    return mid * low_factor, mid, mid * high_factor


def pass_time(
    busy: Busy,
    hardware: HardwareProfile,
    engine: Engine,
    *,
    level: Level,
    graph: bool,
    n_layers: int,
    first_token: bool = False,
) -> PhaseTime:
    """What a pass takes: transfers overlapped or queued, host launches, the engine's own overhead.

    ``graph``: the pass is replayed from a captured graph. ``first_token``: it is a prefill.
    """
    if level == "ideal":
        low, mid = np.maximum(busy.low_s, busy.link_low_s), np.maximum(busy.mid_s, busy.link_mid_s)
    else:
        low, mid = busy.low_s + busy.link_low_s, busy.mid_s + busy.link_mid_s
    high = busy.high_s + busy.link_high_s
    compute, weight, kv, launch, link = busy.parts
    if hardware.is_cpu:  # starting a kernel is part of its measured time
        return PhaseTime(
            low, mid, high, busy.parts, busy.bases, busy.extrapolated, unfitted=busy.unfitted
        )
    if not graph:
        host = [busy.launches * x for x in engine.host_launch_s]
        launch = np.maximum(launch, host[1])
        # a host that waits for every layer cannot start kernels ahead: both times add up
        low, mid, high = (
            np.maximum(t, h) + busy.host_waits * np.minimum(t, h)
            for t, h in zip((low, mid, high), host, strict=True)
        )
    overhead = overhead_s(engine, n_layers=n_layers, first_token=first_token)
    return PhaseTime(
        low + overhead[0],
        mid + overhead[1],
        high + overhead[2],
        (compute, weight, kv, launch + overhead[1], link),
        busy.bases,
        busy.extrapolated,
        busy.unfitted,
    )


def phase_time(
    operations: Operations,
    hardware: HardwareProfile,
    engine: Engine,
    *,
    level: Level,
    graph: bool,
    n_layers: int,
) -> PhaseTime:
    """Time of a pass made of ``operations``."""
    busy = busy_of(operations, hardware, engine)
    return pass_time(busy, hardware, engine, level=level, graph=graph, n_layers=n_layers)


def _split(op: Operation, t: KernelTime) -> tuple[Array, Array, Array]:
    """Busy time of one run as (compute, weight, kv): all of it to compute where that is the longer
    side, otherwise by the bytes moved.
    """
    moved = op.moved_bytes
    if not some(moved):
        return t.compute_s, 0.0, 0.0
    compute_binds = t.compute_s > t.memory_s
    busy = np.where(compute_binds, 0.0, t.memory_s) / np.maximum(moved, 1e-300)
    compute = np.where(compute_binds, t.compute_s, _times(busy, op.activation_bytes))
    kv_bytes = added(op.state_bytes, op.workspace_bytes)
    return compute, _times(busy, op.weight_bytes), _times(busy, kv_bytes)


def _times(rate: Array, amount: Array) -> Array:
    if isinstance(amount, float) and amount == 0.0:
        return 0.0
    return rate * amount


def peak_s(operations: Operations, hardware: HardwareProfile) -> Array:
    """Seconds of the useful FLOPs at the datasheet peaks of their compute types."""
    by_dtype: dict[str, Array] = {}
    for op in operations:
        if some(op.flops):
            by_dtype[op.dtype] = by_dtype.get(op.dtype, 0.0) + op.count * op.flops
    seconds: Array = np.float64(0.0)
    for dtype, flops in by_dtype.items():
        seconds = seconds + flops / hardware.peak(dtype)
    return seconds


def hbm_bytes(operations: Operations) -> Array:
    """Bytes a pass must move through HBM."""
    return total(operations, lambda op: op.hbm_bytes)


def collective_bytes(operations: Operations) -> Array:
    """Bytes one GPU sends to the others of its group."""
    return total(operations, lambda op: op.link_bytes if op.kind == "collective" else 0.0)


def link_bytes(operations: Operations) -> Array:
    """Bytes a pass moves over the host link."""
    return total(operations, lambda op: op.link_bytes if op.kind == "host_link" else 0.0)
