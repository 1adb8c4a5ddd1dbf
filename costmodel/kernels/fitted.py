"""Seconds of an operation from the fitted kernel family nearest to a device and an engine.

What no family was fitted for (sparse patterns, compressed caches, weight-only products,
intermediates that pass through memory) returns None, and the prior answers.
"""

from typing import Any

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.in_situ import InSitu
from costmodel.kernels.asked import Asked, Mask, asked_of
from costmodel.kernels.families import Family, load_family
from costmodel.kernels.prior import KernelTime, prior_time
from costmodel.operation import Array, Operation, some


def fitted_time(
    operation: Operation,
    hardware: HardwareProfile,
    engine: str = "",
    in_situ: InSitu | None = None,
    *,
    middle_only: bool = False,
) -> KernelTime | None:
    """Interval, parts and basis of one run; None where no fitted family describes it.

    ``in_situ``: what becomes of the kernel inside a pass; without it the kernel runs alone.
    ``middle_only``: the interval is of no interest, and is the middle.
    """
    described = _described(operation, hardware, engine)
    if described is None:
        return None
    asked, family = described
    mid = _seconds(family, family.parameters, hardware, asked)
    if asked.kind == "collective":
        found = _collective_time(hardware, family, asked, mid, in_situ, middle_only)
    else:
        found = _kernel_time(operation, hardware, family, asked, mid, in_situ, middle_only)
    if np.all(asked.mask):
        return found
    return _mixed(asked.mask, found, prior_time(operation, hardware, middle_only=middle_only))


def attained_roofline_s(operation: Operation, hardware: HardwareProfile, engine: str) -> Array:
    """The roofline of one run at the share of the bandwidth that its family attains; the
    datasheet's where no family describes it.
    """
    described = _described(operation, hardware, engine)
    datasheet = _floor_s(operation, hardware)
    if described is None:
        return datasheet
    asked, family = described
    return np.where(asked.mask, _floor_s(operation, hardware, _attained(family)), datasheet)


def _described(
    operation: Operation, hardware: HardwareProfile, engine: str
) -> tuple[Asked, Family] | None:
    """What an operation asks, and the family that answers; None where there is none."""
    if hardware.is_cpu or not hardware.n_units:
        return None
    asked = asked_of(operation)
    if asked is None:
        return None
    family = load_family(
        asked.kind,
        engine,
        hardware,
        variant=asked.variant,
        kernel=asked.kernel,
        within=asked.within,
    )
    return None if family is None else (asked, family)


def _attained(family: Family) -> float:
    return float(getattr(family.parameters, "bandwidth_fraction", 1.0))


def _mixed(mask: Mask, found: KernelTime, prior: KernelTime) -> KernelTime:
    """``found`` where ``mask``, the prior elsewhere: every point gets what it would get alone."""
    names = ("low_s", "mid_s", "high_s", "compute_s", "memory_s", "launch_s", "link_s")
    return KernelTime(
        **{name: np.where(mask, getattr(found, name), getattr(prior, name)) for name in names},
        basis=prior.basis,
        extrapolated=np.where(mask, found.extrapolated, prior.extrapolated),
    )


def _seconds(family: Family, parameters: Any, hardware: HardwareProfile, asked: Asked) -> Array:
    """The kernel alone, with cold caches, by the family's parameters or another fit's."""
    if asked.kind != "moe_gemm":
        return family.kind.time_s(parameters, hardware, asked.shape, family.variant, True)
    from costmodel.kernels.moe import grouped_product_time_s  # dense models do without

    s = asked.shape
    return grouped_product_time_s(
        parameters,
        hardware,
        s["n"],
        s["k"],
        s["tokens"],
        s["top_k"],
        s["n_experts"],
        s["n_experts"],
        family.variant,
        inner=s["inner"],
    )


def _kernel_time(
    operation: Operation,
    hardware: HardwareProfile,
    family: Family,
    asked: Asked,
    alone: Array,
    in_situ: InSitu | None,
    middle_only: bool,
) -> KernelTime:
    """A kernel alone or in a pass, and the parts that say what binds.

    Launch is the family's own; the rest goes to compute and memory as the roofline divides it.
    """
    floor = _floor_s(operation, hardware)
    mid = alone
    if in_situ is not None:
        mid = alone + _change_s(operation, hardware, family, alone, floor, in_situ)
    launch = _launch_s(family, mid)
    compute = operation.flops / hardware.peak(operation.dtype) if some(operation.flops) else 0.0
    memory = operation.moved_bytes / hardware.hbm_bytes_per_s
    scale = (mid - launch) / np.maximum(np.maximum(compute, memory), 1e-300)
    compute, memory = compute * scale, memory * scale
    mid = np.maximum(mid, floor)
    low_s, high_s = mid, mid
    if not middle_only:
        low, high = _factors(family, hardware, asked, in_situ)
        low_s, high_s = np.maximum(mid * low, floor), mid * high
    return KernelTime(
        low_s=low_s,
        mid_s=mid,
        high_s=high_s,
        compute_s=compute,
        memory_s=memory,
        launch_s=launch,
        basis=family.basis,
        extrapolated=0.0 if middle_only else family.extrapolated(asked.shape),
    )


def _change_s(
    operation: Operation,
    hardware: HardwareProfile,
    family: Family,
    alone: Array,
    floor: Array,
    in_situ: InSitu,
) -> Array:
    """By how much longer a kernel takes in a pass; see ``costmodel.in_situ``."""
    more = in_situ.kernel_factor(operation) - 1.0
    change: Array = np.float64(0.0)
    if np.any(more > 0.0):
        launch = float(getattr(family.parameters, "launch_s", 0.0))
        # a start that the roofline hides is none: a quicker one must not make the rest longer
        running = np.maximum(alone - launch, np.minimum(alone, floor))
        change = np.maximum(more, 0.0) * running
    if np.any(more < 0.0):
        besides = np.maximum(alone - _floor_s(operation, hardware, _attained(family)), 0.0)
        change = change + np.minimum(more, 0.0) * besides
    return change


def _collective_time(
    hardware: HardwareProfile,
    family: Family,
    asked: Asked,
    mid: Array,
    in_situ: InSitu | None,
    middle_only: bool,
) -> KernelTime:
    launch = _launch_s(family, mid)
    if in_situ is not None:
        mid, launch = mid * in_situ.collective_factor, launch * in_situ.collective_factor
    floor = family.kind.roofline_s(hardware, asked.shape, family.variant)
    mid = np.maximum(mid, floor)  # starts hide behind other kernels, bytes on a link do not
    low, high = _factors(family, hardware, asked, in_situ)
    return KernelTime(
        low_s=np.maximum(mid * low, floor),
        mid_s=mid,
        high_s=mid * high,
        compute_s=0.0,
        memory_s=0.0,
        launch_s=launch,
        link_s=mid - launch,
        basis=family.basis,
        extrapolated=0.0 if middle_only else family.extrapolated(asked.shape),
    )


def _launch_s(family: Family, mid: Array) -> Array:
    """The family's start, or all of what is shorter."""
    launch: Array = float(getattr(family.parameters, "launch_s", 0.0))
    return np.minimum(launch, mid) if np.size(mid) and np.min(mid) < launch else launch


def _factors(
    family: Family, hardware: HardwareProfile, asked: Asked, in_situ: InSitu | None
) -> tuple[Array, Array]:
    """(low, high) on the middle: alone by how far fits differ on it; in a pass, where kernels of
    all sizes add up, one for all of them.
    """
    if in_situ is None:
        return family.factors(lambda fit: _seconds(family, fit, hardware, asked))
    return in_situ.interval(family.spread)


def _floor_s(operation: Operation, hardware: HardwareProfile, attained: float = 1.0) -> Array:
    """The roofline of one run with cold caches at an ``attained`` share of the bandwidth; 1: the
    datasheet's.
    """
    memory: Array = operation.hbm_bytes / (attained * hardware.hbm_bytes_per_s)
    if not some(operation.flops):
        return memory
    return np.maximum(operation.flops / hardware.peak(operation.dtype), memory)
