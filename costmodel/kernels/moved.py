"""A family's parameters on a device and in a kernel it was not fitted on.

Rates are shares of the datasheet and scale with it. What does not is here: fixed times go with the
clock, products that fill the tensor cores with the power there is for them, streams of a cache with
the bandwidth of an SM's share; and the structure is the kernel's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from costmodel.hardware import HardwareProfile
from costmodel.kernels.kinds import KernelKind, kernel_class

#: Kinds whose long calls fill the tensor cores, and the most of the peak that any sustains.
POWER_LIMITED = frozenset({"gemm", "prefill_attention"})
MOST_SUSTAINED = 0.95
#: Kinds whose kernels go by rules of their software, each by its own.
RULED = frozenset({"moe_gemm"})
#: Kinds whose CTAs stream a cache from memory.
STREAMING = frozenset({"decode_attention", "mla_decode_attention"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device stands among the fitted ones; what is not known of it is 0.

    w_per_flops     TDP over the 16-bit peak
    bytes_per_unit  memory bandwidth of one SM's share, bytes/s
    """

    hardware: str
    generation: str
    clock_hz: float
    w_per_flops: float
    bytes_per_unit: float


def place_of(hardware: HardwareProfile) -> Place:
    """Where a device stands."""
    peaks = hardware.peak_flops_per_s
    peak = peaks.get("bf16") or peaks.get("fp16")
    return Place(
        hardware.name,
        hardware.generation,
        hardware.clock_hz or 0.0,
        (hardware.tdp_w or 0.0) / peak if peak else 0.0,
        hardware.hbm_bytes_per_s / hardware.n_units if hardware.n_units else 0.0,
    )


def built_as(kind: KernelKind, variant: str, parameters: Any, fitted: str, kernel: str) -> Any:
    """Parameters fitted on one kernel with the structure of another, where its name tells it.

    Tiles, packing and conversions are the kernel's own, rates are mostly the device's. What only
    the other kernel has is at the centre of its prior.
    """
    if kernel in ("", fitted):
        return parameters
    if kind.name not in RULED and kernel_class(kernel) in ("other", kernel_class(fitted)):
        return parameters
    own = kind.priors(fitted, variant)
    more = {n: p.value for n, p in kind.priors(kernel, variant).items() if n not in own}
    return replace(parameters, **more, **kind.structure(kernel, variant))


def moved(
    kind: KernelKind, values: Mapping[str, float], own: Place, place: Place
) -> dict[str, float]:
    """Values fitted at one place, by parameter, for another.

    Starting a kernel, filling a pipeline or joining splits takes a number of cycles: fitted starts
    of matrix products differ by 2.1 between A100 and L40S, whose clocks differ by 1.8. Times of the
    host (``eager``, ``uncaptured``) and of links between GPUs stay.

    Products that fill the tensor cores run at the clock that the power limit allows, and power goes
    as the cube of the clock: their share of the peak goes as the cube root of the watts that a
    device has for it, which differ fivefold (0.44 W per TFLOP/s on B200, 2.7 on RTX 4090).

    A CTA that streams a cache keeps in flight what its SM's share of the memory bandwidth needs;
    kernels of another generation with a larger share are built to keep more.
    """
    ratios: dict[str, float] = {}
    if kind.name != "collective" and own.clock_hz and place.clock_hz:
        times = filter(_is_device_time, values)
        ratios |= dict.fromkeys(times, own.clock_hz / place.clock_hz)
    if kind.name in POWER_LIMITED and own.w_per_flops and place.w_per_flops:
        ratios["tensor_fraction"] = (place.w_per_flops / own.w_per_flops) ** (1.0 / 3.0)
    if kind.name in STREAMING and own.generation != place.generation and own.bytes_per_unit:
        ratios["stream_bytes_per_s"] = max(place.bytes_per_unit / own.bytes_per_unit, 1.0)

    def there(name: str, value: float) -> float:
        most = max(value, MOST_SUSTAINED) if name == "tensor_fraction" else math.inf
        return min(value * ratios.get(name, 1.0), most)

    return {name: there(name, value) for name, value in values.items()}


def _is_device_time(name: str) -> bool:
    is_time = name.endswith("_s") and not name.endswith("per_s")
    return is_time and not name.startswith(("eager", "uncaptured"))
