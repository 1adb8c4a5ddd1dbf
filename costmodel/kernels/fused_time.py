"""Seconds of an operation that one of this project's kernels runs.

Its family is that of a profile calibrated from records, or that which ships for the nearest GPU;
without either the priors stand in for one, with the basis "prior" and an interval of what kernels
of this form were seen to do elsewhere (0.5 to 0.94 of the bandwidth, starts of half to twice).
"""

import functools

import numpy as np

from costmodel.fused_kernels import work_of
from costmodel.hardware import HardwareProfile
from costmodel.in_situ import InSitu
from costmodel.kernels.families import Family, load_family
from costmodel.kernels.fused import KIND, PRIORS, arithmetic_s, parts_s
from costmodel.kernels.interval import Interval
from costmodel.kernels.physics import values
from costmodel.kernels.prior import KernelTime
from costmodel.operation import Operation

#: Around the priors; calls of up to 30 us are mostly launches.
PRIOR_INTERVAL = Interval(0.8, 1.7)
SHORT_S = 3e-5
SHORT_INTERVAL = Interval(0.5, 1.8)
#: The name a family of these kernels has in place of an engine's.
ENGINE = "lccost"


def fused_time(
    operation: Operation,
    hardware: HardwareProfile,
    in_situ: InSitu | None = None,
    *,
    middle_only: bool = False,
) -> KernelTime:
    """Interval, parts and basis of one run; never below the datasheet roofline of its bytes.

    ``in_situ`` turns a fitted time, of the kernel alone, into that inside a pass; the prior needs
    none.
    """
    variant, shape = operation.kernel, work_of(operation, float(hardware.n_units or 100))
    family = load_family("fused", ENGINE, hardware, variant=variant) or prior_family(variant)
    fitted = family.basis != "prior"
    launch, memory, arithmetic = parts_s(family.parameters, hardware, shape, variant)
    alone = family.kind.time_s(family.parameters, hardware, shape, variant, True)
    # what the shorter of the two leaves unhidden belongs to the longer
    unhidden = alone - launch - np.maximum(memory, arithmetic)
    if fitted and in_situ is not None:
        change = in_situ.memory_factor(operation.kind) - 1.0
        attained = family.parameters.bandwidth_fraction * hardware.hbm_bytes_per_s
        # a factor below 1 is what graphs save of a kernel: none of it is of moving bytes
        memory = memory + change * (
            memory if change > 0.0 else memory - shape["n_bytes"] / attained
        )
        arithmetic = arithmetic * in_situ.compute_factor
    floor = np.maximum(
        operation.flops / hardware.peak(operation.dtype),
        np.maximum(operation.hbm_bytes / hardware.hbm_bytes_per_s, arithmetic_s(hardware, shape)),
    )
    mid = np.maximum(launch + np.maximum(memory, arithmetic) + unhidden, floor)
    low, high = mid, mid
    if not middle_only:
        less, more = family.interval.factors()
        if not fitted:
            short = np.less(mid, SHORT_S)
            least, most = SHORT_INTERVAL.factors()
            less, more = np.where(short, least, less), np.where(short, most, more)
        elif in_situ is not None:
            less, more = in_situ.interval(family.spread)
        low, high = np.minimum(np.maximum(mid * less, floor), mid), mid * more
    return KernelTime(
        low_s=low,
        mid_s=mid,
        high_s=high,
        compute_s=arithmetic,
        memory_s=memory,
        launch_s=launch,
        basis=family.basis,
        extrapolated=0.0 if middle_only else family.extrapolated(shape),
    )


@functools.cache
def prior_family(variant: str) -> Family:
    """What is believed of a kernel before any record of it."""
    return Family(
        kind=KIND,
        variant=variant,
        kernel="",
        engine=ENGINE,
        hardware="",
        generation="",
        parameters=KIND.build(values(PRIORS)),
        interval=PRIOR_INTERVAL,
        n_rows=0,
        ranges={},
        held_out={},
        source="priors of costmodel/kernels/fused.py",
        basis="prior",
    )
