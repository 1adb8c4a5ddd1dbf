"""What a device can do: datasheet numbers, each with a source, and optional calibration.

Profiles are ``hardware_profiles/*.toml`` or a user's own file of the same form. Prices live apart, in a
dated file. A calibrated profile adds ``[families.*]`` (physical kernel parameters, fitted from
tables) or ``[curves.*]`` (efficiency measured on this very device).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from costmodel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measured cost of one operation class on one device.

    ``x`` grid of the size the class depends on (its unit is in the class name), ``y`` the measured
    seconds per unit of work at that size. Interpolated in log space; outside the grid the end
    value holds and the prediction is marked ``extrapolated``.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One device. Rates are dense datasheet figures.

    peak_flops_per_s   by compute dtype (fp32, tf32, bf16, fp16, fp8, int8, fp4)
    hbm_bytes_per_s    memory bandwidth
    memory_bytes       capacity as the driver reports it
    memory_marketing_bytes  capacity on the box, for display only
    l2_bytes           last-level cache; n_units: SMs, CUs, cores
    link_bytes_per_s   GPU to GPU, one direction, per GPU; None without such a link
    host_link_bytes_per_s   to host memory, one direction
    tdp_w, price_usd_per_hour (low, mid, high), price_date
    sources, confidence     per field name
    curves             measured efficiency (only in a profile of the device it was measured on)
    families           fitted kernel-family parameters: kind -> parameter -> value
    """

    name: str
    title: str
    vendor: str
    generation: str
    n_units: int | None
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes_per_s: float
    memory_bytes: float
    memory_marketing_bytes: float
    l2_bytes: float | None
    tdp_w: float | None
    link_bytes_per_s: float | None
    host_link_bytes_per_s: float | None
    price_usd_per_hour: tuple[float, float, float] | None = None
    price_date: str = ""
    max_gpus_per_node: int = 8
    is_cpu: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)
    confidence: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    families: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def peak(self, dtype: str) -> float:
        """Dense peak of a compute dtype; raises ``ConfigError`` where the device has none."""
        if dtype in self.peak_flops_per_s:
            return self.peak_flops_per_s[dtype]
        known = ", ".join(sorted(self.peak_flops_per_s))
        hint = " Use --dtype fp16." if dtype == "bf16" and "fp16" in self.peak_flops_per_s else ""
        raise ConfigError(f"{self.name} has no {dtype} peak; it has: {known}.{hint}")

    def ridge_flops_per_byte(self, dtype: str) -> float:
        """Arithmetic intensity at which compute and bandwidth take the same time."""
        return self.peak(dtype) / self.hbm_bytes_per_s
