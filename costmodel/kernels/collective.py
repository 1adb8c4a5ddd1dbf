"""Seconds of one collective inside a node, from physical parameters (alpha-beta).

    one-shot    every GPU reads all others' message:            (n - 1) M bytes
    two-step    reduce-scatter then all-gather (ring, tree):     2 (n - 1) / n M bytes
    in-switch   the switch adds and multicasts (Hopper and up):  (n + 1) / n M bytes
    time        t0 + t_peer (n - 1) + bytes / (e link)

An all-reduce takes the fastest of them, with a start of its own for those that synchronise more
than once; an all-gather moves (n - 1) / n of the gathered bytes. Tables made without a captured
graph show the host instead where the host is slower.

What is ignored: traffic of other collectives, links between nodes, and the step where a library
changes its protocol (the main part of the scatter at 0.1 to 1 MB).
"""

from dataclasses import dataclass

import numpy as np

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, Shape, Work
from costmodel.kernels.physics import Prior
from costmodel.operation import Array

#: Generations whose NVLink switches add and multicast.
IN_SWITCH_GENERATIONS = frozenset({"hopper", "blackwell", "blackwell-ultra"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveParameters:
    """One family of collectives.

    launch_s           start of the kernel and the first synchronisation, t0
    peer_s             more per further GPU
    second_phase_s     extra start of the forms with two phases
    one_shot_fraction  attained share of a GPU's link when it reads from all peers at once
    link_fraction      attained share of the link in long transfers
    eager_s            host time per call; only in tables made without a captured graph
    """

    launch_s: float
    peer_s: float
    second_phase_s: float
    one_shot_fraction: float
    link_fraction: float
    eager_s: float = 0.0


PRIORS: dict[str, Prior] = {
    "launch_s": Prior(4e-6, 0.5, 5e-7, 6e-5, "start and first synchronisation"),
    "peer_s": Prior(2e-7, 0.8, 1e-9, 5e-6, "more per further GPU"),
    "second_phase_s": Prior(3e-6, 0.8, 1e-8, 5e-5, "extra start of two-phase forms"),
    "one_shot_fraction": Prior(0.6, 0.4, 0.05, 1.0, "link share of one-shot reads"),
    "link_fraction": Prior(0.65, 0.2, 0.2, 1.0, "link share of long transfers"),
    "eager_s": Prior(2e-6, 2.0, 1e-7, 1e-3, "host time per call, no captured graph"),
}


def collective_time_s(
    parameters: CollectiveParameters,
    device: HardwareProfile,
    message_bytes: Array,
    n_gpus: Array,
    operation: str = "all_reduce",
    *,
    cold: bool = True,
) -> Array:
    """Seconds of one collective. Shape: that of the arguments broadcast.

    ``message_bytes`` is the reduced vector, or the gathered result.
    """
    p = parameters
    link = link_bytes_per_s(device)
    message = np.asarray(message_bytes, dtype=np.float64)
    n = np.asarray(n_gpus, dtype=np.float64)
    start = p.launch_s + p.peer_s * (n - 1.0)
    wire = wire_bytes(device, message, n, operation)
    seconds: Array = start + p.second_phase_s + wire / (p.link_fraction * link)
    if operation == "all_reduce":
        one_shot = start + (n - 1.0) * message / (p.one_shot_fraction * link)
        seconds = np.minimum(seconds, one_shot)
    if not cold and p.eager_s:
        seconds = np.maximum(seconds, p.eager_s)
    return np.where(n > 1.0, np.maximum(seconds, wire / link), 0.0)


def link_bytes_per_s(device: HardwareProfile) -> float:
    """One direction of a GPU's link to its peers; the host link where there is no other."""
    return device.link_bytes_per_s or device.host_link_bytes_per_s or device.hbm_bytes_per_s


def wire_bytes(device: HardwareProfile, message: Array, n: Array, operation: str) -> Array:
    """Bytes one GPU sends in the form that sends least."""
    if operation != "all_reduce":
        gathered: Array = message * (n - 1.0) / n
        return gathered
    two_step = 2.0 * (n - 1.0) / n
    if device.generation in IN_SWITCH_GENERATIONS:
        two_step = np.minimum(two_step, (n + 1.0) / n)
    reduced: Array = message * two_step
    return reduced


def _time(
    parameters: CollectiveParameters,
    device: HardwareProfile,
    shape: Shape,
    variant: str,
    cold: bool,
) -> Array:
    message, n = shape["message_bytes"], shape["n_gpus"]
    return collective_time_s(parameters, device, message, n, variant, cold=cold)


def _work(device: HardwareProfile, shape: Shape, variant: str) -> Work:
    message = np.asarray(shape["message_bytes"], dtype=np.float64)
    n = np.asarray(shape["n_gpus"], dtype=np.float64)
    wire = wire_bytes(device, message, n, variant)
    return Work(wire, link_bytes_per_s(device), 0.0)


KIND = KernelKind(
    name="collective",
    parameters=CollectiveParameters,
    shape=("message_bytes", "n_gpus"),
    variants=("all_reduce", "all_gather"),
    priors=lambda kernel, variant: PRIORS,
    structure=lambda kernel, variant: {},
    time_s=_time,
    work=_work,
)
