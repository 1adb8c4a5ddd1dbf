"""Seconds of one operation where nothing is calibrated: a prior with physical parameters.

    t = launches * t0 + max-like(compute, vector, memory)
    compute = FLOPs / (e_c * peak),  vector = vector FLOPs / (e_v * fp32 peak),
    memory  = bytes / (e_b * bandwidth)

``low`` overlaps perfectly at optimistic efficiencies, ``mid`` takes the root of the squares (near
the ridge neither limit is reached alone) at typical ones, ``high`` adds the two at pessimistic
ones. So the attained rate falls with size (the launch floor) and near the ridge point, and nothing
is ever below the datasheet roofline of the same operation.

Where the numbers come from: prefill MFU 0.38-0.73 over engines and GPUs, 0.50-0.54 for
FlashAttention-2 on an A100 from 50k to 1M tokens (MInference README), decode MBU 0.65-0.81
(published serving and gpt-fast runs), kernel floors of 3-6 us for a GEMM and 8-12 us for decode
attention on Hopper.
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.operation import Array, Operation, some

#: (low, mid, high): optimistic, typical, pessimistic.
Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorParameters:
    """Efficiencies (share of the datasheet rate) and launch floors of one kind of operation."""

    compute_fraction: Triple
    bandwidth_fraction: Triple
    floor_s: Triple
    vector_fraction: Triple = (0.80, 0.45, 0.20)


_STREAM: Triple = (0.94, 0.80, 0.62)
#: By kind, or by the operation's own name where its kernel is unlike the others of the kind.
PRIORS: dict[str, PriorParameters] = {
    "gemm": PriorParameters(
        compute_fraction=(0.88, 0.70, 0.52),
        bandwidth_fraction=_STREAM,
        floor_s=(1.5e-6, 3.0e-6, 6.0e-6),
    ),
    "moe_gemm": PriorParameters(
        compute_fraction=(0.80, 0.50, 0.30),
        bandwidth_fraction=(0.90, 0.65, 0.40),
        floor_s=(4e-6, 12e-6, 30e-6),
    ),
    "prefill_attention": PriorParameters(
        compute_fraction=(0.75, 0.55, 0.38),
        bandwidth_fraction=_STREAM,
        floor_s=(4e-6, 10e-6, 20e-6),
    ),
    # Vertical-slash patterns: scattered columns, diagonals in whole blocks of 64. MInference's
    # README (A100, Llama-3-8B, 50k to 1M tokens) leaves 0.06 (its own kernels at 1M) to 0.3 of the
    # peak (SGLang's) once the time of its band attention's matmuls is taken off.
    "sparse_attention": PriorParameters(
        compute_fraction=(0.55, 0.20, 0.06),
        bandwidth_fraction=_STREAM,
        floor_s=(4e-6, 10e-6, 20e-6),
    ),
    "decode_attention": PriorParameters(
        compute_fraction=(0.70, 0.40, 0.20),
        bandwidth_fraction=(0.93, 0.75, 0.50),
        floor_s=(4e-6, 9e-6, 14e-6),
    ),
    "mla_prefill_attention": PriorParameters(
        compute_fraction=(0.70, 0.50, 0.33),
        bandwidth_fraction=_STREAM,
        floor_s=(5e-6, 12e-6, 25e-6),
    ),
    "mla_decode_attention": PriorParameters(
        compute_fraction=(0.75, 0.50, 0.25),
        bandwidth_fraction=(0.90, 0.65, 0.40),
        floor_s=(6e-6, 15e-6, 30e-6),
    ),
    "scan_prefill": PriorParameters(
        compute_fraction=(0.50, 0.25, 0.10),
        bandwidth_fraction=(0.90, 0.60, 0.35),
        floor_s=(6e-6, 20e-6, 60e-6),
    ),
    "scan_step": PriorParameters(
        compute_fraction=(0.50, 0.25, 0.10),
        bandwidth_fraction=(0.92, 0.70, 0.45),
        floor_s=(2e-6, 5e-6, 12e-6),
    ),
    "elementwise": PriorParameters(
        compute_fraction=(1.0, 1.0, 1.0),
        bandwidth_fraction=(0.92, 0.75, 0.50),
        floor_s=(0.6e-6, 1.5e-6, 3.5e-6),
    ),
    "select": PriorParameters(
        compute_fraction=(1.0, 1.0, 1.0),
        bandwidth_fraction=(0.60, 0.25, 0.08),
        floor_s=(3e-6, 10e-6, 40e-6),
    ),
}

#: Latency of one collective (kernel, synchronisation) and the share of the link it reaches.
COLLECTIVE_LATENCY_S: Triple = (5e-6, 14e-6, 35e-6)
COLLECTIVE_FRACTION: Triple = (0.90, 0.65, 0.40)
#: Host-link transfers: share of the one-direction rate (pinned memory; pageable reaches the last).
HOST_LINK_FRACTION: Triple = (0.92, 0.78, 0.40)
HOST_LINK_LATENCY_S: Triple = (3e-6, 10e-6, 25e-6)


@dataclass(frozen=True, slots=True, eq=False)
class KernelTime:
    """Seconds of one run of an operation.

    low_s, mid_s, high_s   the interval
    compute_s, memory_s, launch_s, link_s   parts of the middle estimate before they overlap; they
                           say what binds
    basis                  where the estimate comes from
    extrapolated           outside the range its parameters were measured on
    """

    low_s: Array
    mid_s: Array
    high_s: Array
    compute_s: Array
    memory_s: Array
    launch_s: Array
    link_s: Array = 0.0
    basis: str = "prior"
    extrapolated: Array = 0.0


def timed_flops(operation: Operation) -> Array:
    """FLOPs a kernel spends time on. Flash-style attention skips the masked half of the square that
    a FLOP counter sees; everything else runs what it counts.
    """
    if operation.kind == "prefill_attention" and some(operation.flops):
        return operation.flops
    return operation.counted_flops


def vector_peak(hardware: HardwareProfile) -> float:
    """FLOP/s of elementwise work: the fp32 figure, or a sixteenth of the matrix units' 16-bit one
    where the datasheet of an accelerator gives none (the ratio of an A100).
    """
    peaks = hardware.peak_flops_per_s
    return peaks.get("fp32") or (peaks.get("bf16") or peaks.get("fp16") or min(peaks.values())) / 16


def _peak(operation: Operation, hardware: HardwareProfile) -> float:
    """Matrices in fp32 run on the vector units of a device whose matrix units do not take them."""
    if operation.dtype == "fp32" and "fp32" not in hardware.peak_flops_per_s:
        return vector_peak(hardware)
    return hardware.peak(operation.dtype)


def prior_time(
    operation: Operation, hardware: HardwareProfile, *, middle_only: bool = False
) -> KernelTime:
    """The prior's interval for one run; shape: that of the operation's amounts.

    ``middle_only``: the interval is of no interest, and may be the middle.
    """
    if operation.kind == "collective":
        return _collective(operation, hardware)
    if operation.kind == "host_link":
        return _host_link(operation, hardware)
    prior = PRIORS.get(operation.name) or PRIORS[operation.kind]
    flops = timed_flops(operation)
    has_flops = some(flops)
    compute = flops / _peak(operation, hardware) if has_flops else 0.0
    vector = operation.vector_flops / vector_peak(hardware)
    memory = operation.moved_bytes / hardware.hbm_bytes_per_s
    launches = operation.launches
    has_vector = some(vector)

    def busy(i: int) -> tuple[Array, Array]:
        work: Array = 0.0
        if has_flops:
            work = compute / prior.compute_fraction[i]
        if has_vector:
            also = vector / prior.vector_fraction[i]
            work = np.maximum(work, also) if has_flops else also
        return work, memory / prior.bandwidth_fraction[i]

    c1, m1 = busy(1)
    mid = (np.sqrt(c1 * c1 + m1 * m1) if np.any(c1) else m1) + launches * prior.floor_s[1]
    low, high = mid, mid
    if not middle_only:
        c0, m0 = busy(0)
        c2, m2 = busy(2)
        low = np.maximum(c0, m0) + launches * prior.floor_s[0]
        high = c2 + m2 + launches * prior.floor_s[2]
    return KernelTime(
        low_s=low,
        mid_s=mid,
        high_s=high,
        compute_s=c1,
        memory_s=m1,
        launch_s=launches * prior.floor_s[1],
    )


def _collective(operation: Operation, hardware: HardwareProfile) -> KernelTime:
    """Ring or tree: 2 (n-1)/n of the message over each GPU's link for an all-reduce (the
    operation's ``link_bytes`` already holds what one GPU sends), plus a latency per call.
    """
    rate = hardware.link_bytes_per_s or hardware.host_link_bytes_per_s or hardware.hbm_bytes_per_s
    wire = operation.link_bytes / rate
    low, mid, high = (
        wire / f + operation.launches * t
        for f, t in zip(COLLECTIVE_FRACTION, COLLECTIVE_LATENCY_S, strict=True)
    )
    latency = operation.launches * COLLECTIVE_LATENCY_S[1]
    return KernelTime(low, mid, high, 0.0, 0.0, latency, wire / COLLECTIVE_FRACTION[1])


def _host_link(operation: Operation, hardware: HardwareProfile) -> KernelTime:
    """Copies between host and device memory."""
    rate = hardware.host_link_bytes_per_s or hardware.hbm_bytes_per_s
    wire = operation.link_bytes / rate
    low, mid, high = (
        wire / f + operation.launches * t
        for f, t in zip(HOST_LINK_FRACTION, HOST_LINK_LATENCY_S, strict=True)
    )
    return KernelTime(low, mid, high, 0.0, 0.0, 0.0, wire / HOST_LINK_FRACTION[1])
