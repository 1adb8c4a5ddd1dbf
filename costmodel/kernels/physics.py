"""The few physical pieces that every fitted kernel model is made of.

All functions take scalars or arrays that broadcast, and return float64. Nothing here is fitted:
what differs between kernels comes in as a parameter.

warm and cold
    Published kernel tables replay the same buffers, so a working set smaller than the last-level
    cache never touches DRAM after the first run: a *warm* call. In a real step the weights and the
    other layers' caches pass in between and evict it: a *cold* call. Models are fitted and judged
    warm and predict cold; a cold call is never faster than the datasheet roofline, a warm one
    never faster than the cache's own rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.hardware import HardwareProfile
from costmodel.operation import Array

#: Bytes one SM can take from the last-level cache per clock (64 on every NVIDIA part since Volta:
#: arXiv:1804.06826 table 3.1, arXiv:2402.13499 table V), used only as a limit nothing may beat.
CACHE_BYTES_PER_UNIT_PER_CLOCK = 64.0
#: Clock assumed where a profile gives none.
TYPICAL_CLOCK_HZ = 1.8e9
#: Generations whose large dies have a cache in two partitions; GA102 has the 6 MB of one.
PARTITIONED = frozenset({"ampere", "hopper", "blackwell", "blackwell-ultra"})
LEAST_PARTITIONED_BYTES = 2e7
#: Cache assumed where a profile gives none: nothing stays resident.
NO_CACHE_BYTES = 1.0


@dataclass(frozen=True, slots=True)
class Prior:
    """What is believed of one parameter before any row is read.

    value   the centre, in the parameter's unit; fits work on its logarithm
    spread  standard deviation of the logarithm; 0 keeps the parameter at ``value``
    low, high   limits
    meaning one line, for the calibration file
    """

    value: float
    spread: float
    low: float
    high: float
    meaning: str


def clock_ratio(device: HardwareProfile) -> float:
    """Return the clock against 1.8 GHz: rates per SM scale with it."""
    return (device.clock_hz or TYPICAL_CLOCK_HZ) / TYPICAL_CLOCK_HZ


def units(device: HardwareProfile) -> float:
    """SMs (or compute units, or cores) that share the work."""
    return float(device.n_units or 100)


def cache_bytes(device: HardwareProfile) -> float:
    """Last-level cache, or next to nothing where the profile does not say."""
    return device.l2_bytes or NO_CACHE_BYTES


def seen_cache_bytes(device: HardwareProfile) -> float:
    """Cache that holds what every SM reads: half of one in two partitions, which keep a copy each.

    So since GA100 (NVIDIA A100 whitepaper, "each L2 partition caches data for memory accesses from
    SMs in the GPCs directly connected to the partition"); the small caches of GA102 and Ada's are
    of one piece.
    """
    n_bytes = cache_bytes(device)
    partitioned = device.generation in PARTITIONED and n_bytes >= LEAST_PARTITIONED_BYTES
    return n_bytes / 2.0 if partitioned else n_bytes


def cache_bytes_per_s(device: HardwareProfile) -> float:
    """Return the most the last-level cache can deliver: 64 bytes per SM and clock."""
    clock = device.clock_hz or TYPICAL_CLOCK_HZ
    return max(units(device) * CACHE_BYTES_PER_UNIT_PER_CLOCK * clock, device.hbm_bytes_per_s)


def tensor_peak(device: HardwareProfile, dtype: str) -> float:
    """Dense peak of the multiplications; fp16's where bf16 is missing, bf16's where fp8 is."""
    peaks = device.peak_flops_per_s
    for name in (dtype, *_STAND_INS.get(dtype, ())):
        if name in peaks:
            return peaks[name]
    return device.peak(dtype)


_STAND_INS = {"bf16": ("fp16",), "fp16": ("bf16",), "fp8": ("bf16", "fp16")}


def fp8_share(device: HardwareProfile, element_bytes: Array) -> Array:
    """Factor that turns fp8 FLOPs into the bf16 FLOPs that take as long at datasheet peaks."""
    gain = tensor_peak(device, "bf16") / tensor_peak(device, "fp8")
    return np.where(np.less(element_bytes, 1.5), gain, 1.0)


def miss_fraction(working_set_bytes: Array, resident_bytes: float, *, doublings: int = 4) -> Array:
    """Share of a replayed working set that has to come from DRAM again.

    miss = z^16 / (1 + z^16), z = working set / resident bytes: replayed in order, a set that does
    not fit evicts itself before it comes round again, so residency ends sharply. The exponent is
    2^``doublings``: smaller where buffers of several calls share the cache.
    """
    z = np.minimum(np.asarray(working_set_bytes, dtype=np.float64) / resident_bytes, 1e6)
    for _ in range(doublings):
        z *= z
    miss: Array = z / (1.0 + z)
    return miss


def waves(ctas_per_slot: Array, rounding: Array) -> Array:
    """Count the rounds of x thread blocks per slot, the last round only partly filled.

    ``rounding`` 1: every started round takes as long as a full one; 0: blocks share the machine
    perfectly. Never below one.
    """
    x = np.maximum(ctas_per_slot, 1.0)
    # Splits are chosen to fill slots exactly: rounding errors must not start another round.
    started = np.ceil(x - 1e-9)
    started -= x
    rounds: Array = started * rounding
    rounds += x
    return rounds


def overlapped(a_s: Array, b_s: Array, unhidden: float) -> Array:
    """Two activities at once: the longer one, plus the share of the shorter one nothing hides."""
    both: Array = np.maximum(a_s, b_s) + unhidden * np.minimum(a_s, b_s)
    return both


def burst_gain(busy_s: Array, gain: float, burst_s: float) -> Array:
    """Factor on the tensor rate: ``1 + gain`` for calls far shorter than ``burst_s``, else 1.

    A short call runs before power and temperature limits lower the clock.
    """
    busy = np.asarray(busy_s, dtype=np.float64)
    share = gain * busy
    share /= busy + burst_s
    share += 1.0
    factor: Array = (1.0 + gain) / share
    return factor


def limited(
    seconds: Array, flops: Array, peak: float, n_bytes: Array, device: HardwareProfile, cold: bool
) -> Array:
    """``seconds``, but never faster than the device can be.

    Cold: max(FLOPs / peak, bytes / DRAM bandwidth). Warm: the bytes at the cache's rate instead.
    """
    rate = device.hbm_bytes_per_s if cold else cache_bytes_per_s(device)
    floor = np.maximum(np.asarray(flops) / peak, np.asarray(n_bytes) / rate)
    out: Array = np.maximum(seconds, floor)
    return out


def floats(*values: Any) -> tuple[NDArray[np.float64], ...]:
    """Every argument as float64."""
    return tuple(np.asarray(v, dtype=np.float64) for v in values)


def element_bytes(dtype: str) -> float:
    """Bytes of one stored element; fp8 in all its spellings is 1, anything else 2."""
    return 1.0 if dtype.startswith(("fp8", "int8", "e4m3", "e5m2")) else 2.0


def values(priors: Mapping[str, Prior]) -> dict[str, float]:
    """Return the centres of the priors, by name."""
    return {name: prior.value for name, prior in priors.items()}
