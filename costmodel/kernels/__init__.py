"""Seconds of operations on a device.

``time_operation`` picks the best knowledge there is: efficiency curves measured on this very
device, then fitted kernel families, then the prior. What this project's own kernels run has
families of its own. Every estimate names its ``basis``.
"""

from dataclasses import replace

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.in_situ import InSitu
from costmodel.kernels.fitted import fitted_time
from costmodel.kernels.prior import KernelTime as KernelTime
from costmodel.kernels.prior import prior_time
from costmodel.operation import Operation


def time_operation(
    operation: Operation,
    hardware: HardwareProfile,
    engine: str = "",
    in_situ: InSitu | None = None,
    *,
    middle_only: bool = False,
) -> KernelTime:
    """Interval, parts and basis of one run of ``operation``.

    ``engine`` names whose fitted families to use; without one only a profile's own families count.
    ``in_situ`` turns the time of a kernel alone into that inside a pass; curves and the prior,
    which come from passes, need none. ``middle_only`` leaves the interval out: it is the middle.
    """
    # What most predictions do without is imported where it is met: start-up is felt.
    if operation.kernel and not hardware.is_cpu:
        from costmodel.kernels.fused_time import fused_time

        return fused_time(operation, hardware, in_situ, middle_only=middle_only)
    if hardware.curves:
        from costmodel.kernels.curves import calibrated_time

        calibrated = calibrated_time(operation, hardware)
        if calibrated is not None:
            return calibrated
    if engine or hardware.families:
        fitted = fitted_time(operation, hardware, engine, in_situ, middle_only=middle_only)
        if fitted is not None:
            return fitted
    prior = prior_time(operation, hardware, middle_only=middle_only)
    if middle_only or in_situ is None or operation.kind != "elementwise":
        return prior
    # Small kernels were in the passes that the factors around passes come from.
    low, high = in_situ.interval()
    return replace(
        prior,
        low_s=np.maximum(prior.low_s, prior.mid_s * low),
        high_s=np.minimum(prior.high_s, prior.mid_s * high),
    )
