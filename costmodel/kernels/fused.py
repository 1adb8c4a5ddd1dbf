"""Seconds of this project's own kernels (``costmodel.fused_kernels``), from physical parameters.

n kernels of a replayed graph, S SMs at clock f, at most P programs:

    launches    t0 + (n - 1) t1
    memory      the longest of
                    bytes / (e_b bandwidth), bytes / (P r), bytes of one block / r
    arithmetic  the longest of
                    lane instructions issued    / (e_a 128 S f)
                    those on the integer pipe   / (e_a  64 S f)
                    exponentials and their like / (e_a  16 S f)
                    16-bit products / (e_a peak),  tf32 products / (e_a peak / 2)
    time        launches + longer + u shorter

so a kernel's ceiling is the smaller of memory bandwidth and its arithmetic. The lanes are those of
Hopper, from which the kernels' docstrings derive their ceilings; Ampere and Ada have the same.

Until records of these kernels are fitted (``lccost calibrate --table kernels.jsonl``) the
parameters are the priors below and the basis says so. Records are taken with cold caches, so
nothing here distinguishes warm calls from cold ones.

What is ignored: tails of the last programs, and that working sets of a few megabytes may stay in
the cache from one kernel of a step to the next.
"""

from dataclasses import dataclass

import numpy as np

from costmodel.fused_kernels import AMOUNTS, KERNELS, most_programs
from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work
from costmodel.kernels.physics import (
    TYPICAL_CLOCK_HZ,
    Prior,
    clock_ratio,
    overlapped,
    tensor_peak,
    units,
)
from costmodel.operation import Array

#: Lanes of one SM per clock: instructions issued, integer pipe, special function units.
_LANES = {"issued_ops": 128.0, "integer_ops": 64.0, "special_ops": 16.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedParameters:
    """One family of our kernels.

    launch_s             start of a step's first kernel, t0
    next_launch_s        each kernel after it, t1
    bandwidth_fraction   attained share of DRAM bandwidth, e_b
    arithmetic_fraction  attained share of the rate that binds, e_a
    stream_bytes_per_s   what one program streams at 1.8 GHz, r
    unhidden_fraction    share of the shorter activity that nothing hides, u
    """

    launch_s: float
    next_launch_s: float
    bandwidth_fraction: float
    arithmetic_fraction: float
    stream_bytes_per_s: float
    unhidden_fraction: float


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(5e-6, 0.5, 5e-7, 5e-5, "start of a step's first kernel"),
    "next_launch_s": Prior(2e-6, 0.5, 1e-7, 2e-5, "each kernel of the step after it"),
    "bandwidth_fraction": Prior(0.80, 0.10, 0.2, 1.0, "attained share of DRAM bandwidth"),
    "arithmetic_fraction": Prior(0.60, 0.30, 0.05, 1.0, "attained share of the rate that binds"),
    "stream_bytes_per_s": Prior(1e10, 0.7, 1e8, 1e12, "one program's stream at 1.8 GHz"),
    "unhidden_fraction": Prior(0.2, 0.5, 0.001, 1.0, "share of the shorter activity not hidden"),
}


def arithmetic_s(device: HardwareProfile, shape: Shape) -> Array:
    """Seconds of the arithmetic that takes longest at full rates."""
    clock = units(device) * (device.clock_hz or TYPICAL_CLOCK_HZ)
    half = tensor_peak(device, "bf16")
    longest: Array = np.asarray(shape["half_flops"]) / half
    longest = np.maximum(longest, np.asarray(shape["tf32_flops"]) / (half / 2.0))
    for name, lanes in _LANES.items():
        longest = np.maximum(longest, np.asarray(shape[name]) / (lanes * clock))
    return longest


def parts_s(
    p: FusedParameters, device: HardwareProfile, shape: Shape, variant: str
) -> tuple[Array, Array, Array]:
    """Seconds of (launches, memory, arithmetic) before they overlap."""
    kernel = KERNELS[variant]
    launches = p.launch_s + (np.asarray(shape["launches"]) - 1.0) * p.next_launch_s
    n_bytes = np.asarray(shape["n_bytes"])
    memory: Array = n_bytes / (p.bandwidth_fraction * device.hbm_bytes_per_s)
    if kernel.block_tokens:
        stream = p.stream_bytes_per_s * clock_ratio(device)
        programs = most_programs(kernel, shape["units"], units(device))
        longest = np.maximum(n_bytes / programs, shape["block_bytes"])
        memory = np.maximum(memory, longest / stream)
    return launches, memory, arithmetic_s(device, shape) / p.arithmetic_fraction


def _time(
    parameters: FusedParameters, device: HardwareProfile, shape: Shape, variant: str, cold: bool
) -> Array:
    launches, memory, arithmetic = parts_s(parameters, device, shape, variant)
    seconds: Array = launches + overlapped(memory, arithmetic, parameters.unhidden_fraction)
    return seconds


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    """The datasheet roofline's: products and bytes; tf32 counts twice at the 16-bit peak."""
    flops = np.asarray(shape["half_flops"]) + 2.0 * np.asarray(shape["tf32_flops"])
    return Work(flops, tensor_peak(device, "bf16"), shape["n_bytes"])


KIND = KernelKind(
    name="fused",
    parameters=FusedParameters,
    shape=AMOUNTS,
    variants=tuple(KERNELS),
    priors=lambda kernel, variant: PRIORS,
    structure=lambda kernel, variant: {},
    time_s=_time,
    work=_work,
)
