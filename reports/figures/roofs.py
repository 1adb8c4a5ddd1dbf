"""The roofs of a roofline: what a device allows, by dtype, from the datasheet or measured."""

import math
from typing import TYPE_CHECKING, Any

from costmodel.hardware import HardwareProfile
from costmodel.units import DTYPE_BYTES, format_si
from reports.figures.placing import ABOVE, BELOW, Placer
from reports.figures.style import GREY, LIGHT_GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURED_STYLE: dict[str, Any] = {
    "color": GREY,
    "linewidth": 1.2,
    "linestyle": (0, (6, 2, 1, 2)),
    "zorder": 1.6,
}


def calibrated_rates(hardware: HardwareProfile, dtype: str) -> tuple[float | None, float | None]:
    """Best measured (FLOP/s, bytes/s) among the profile's curves; None where none was measured.

    A curve holds seconds per unit of work (``costmodel.kernels.curves``). Compute: the best matmul
    of the dtype at any size. Memory: streams and attention over the cache at their largest size
    (smaller ones may sit in the last-level cache), and matmuls with one row, which read every
    weight for two FLOPs.
    """
    compute, memory = [], []
    for name, curve in hardware.curves.items():
        kind, _, variant = name.partition("/")
        if kind == "stream":
            memory.append(1.0 / curve.y[-1])
        elif variant.split("/")[0] != dtype:
            continue
        elif kind == "gemm":
            compute += [1.0 / y for y in curve.y]
            one_row = [y for x, y in zip(curve.x, curve.y, strict=True) if x == 1]
            if dtype in DTYPE_BYTES:
                memory += [DTYPE_BYTES[dtype] / (2.0 * y) for y in one_row]
        elif kind == "decode_attention":
            memory.append(1.0 / curve.y[-1])
    return max(compute, default=None), max(memory, default=None)


def draw_roofs(axes: "Axes", hardware: HardwareProfile, used: set[str]) -> None:
    """Draw datasheet roofs (strong for dtypes in use), ridge points and measured roofs."""
    limits = axes.get_xlim(), axes.get_ylim()
    left, right = limits[0]
    bandwidth = hardware.hbm_bytes_per_s
    for peak, dtypes in _by_peak(hardware):
        is_used = bool(used & set(dtypes))
        ridge = peak / bandwidth
        axes.plot(
            [min(left, ridge), ridge, max(right, ridge)],
            [min(left, ridge) * bandwidth, peak, peak],
            color=GREY if is_used else LIGHT_GREY,
            linewidth=1.6 if is_used else 0.9,
            zorder=1.5 if is_used else 1.4,
            gid=f"roof-{'-'.join(dtypes)}",
        )
        if is_used:
            axes.axvline(ridge, color=LIGHT_GREY, linewidth=0.8, linestyle=":", gid="ridge")
    for dtype in sorted(used & set(hardware.peak_flops_per_s)):
        _draw_measured(axes, hardware, dtype)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def label_roofs(axes: "Axes", placer: Placer, hardware: HardwareProfile, used: set[str]) -> None:
    """Name every roof on its flat part where there is room; those in use first."""
    right = axes.get_xlim()[1]
    roofs = sorted(_by_peak(hardware), key=lambda r: (not used & set(r[1]), -r[0]))
    for peak, dtypes in roofs:
        ridge = peak / hardware.hbm_bytes_per_s
        text = f"{', '.join(dtypes)} {format_si(peak, 'FLOP/s')}"
        colour = GREY if used & set(dtypes) else "#888888"
        placer.place(_along(ridge, right, peak), text, ABOVE, color=colour, fontsize=7.5)
        if used & set(dtypes):
            label = f"ridge {ridge:.0f} FLOP/B" if ridge >= 10 else f"ridge {ridge:.2g} FLOP/B"
            bottom = axes.get_ylim()[0]
            placer.place([(ridge, bottom)], label, ABOVE, color=GREY, fontsize=7.5)
    for dtype in sorted(used & set(hardware.peak_flops_per_s)):
        rates = _measured_roof(hardware, dtype)
        if rates is not None:
            peak, bandwidth = rates
            text = f"measured {format_si(peak, 'FLOP/s')}, {format_si(bandwidth, 'B/s')}"
            anchors = _along(peak / bandwidth, right, peak)
            placer.place(anchors, text, (*BELOW, *ABOVE), color=GREY, fontsize=7.5)


def _by_peak(hardware: HardwareProfile) -> list[tuple[float, list[str]]]:
    """Dtypes of equal peak share a roof."""
    by_peak: dict[float, list[str]] = {}
    for dtype, peak in hardware.peak_flops_per_s.items():
        by_peak.setdefault(peak, []).append(dtype)
    return sorted(by_peak.items())


def _along(start: float, end: float, height: float) -> list[tuple[float, float]]:
    """Anchors on a flat roof, from its beginning to the right."""
    reach = max(end / start, 1.0)
    return [(start * reach**fraction, height) for fraction in (0.0, 0.1, 0.2, 0.35, 0.5, 0.65)]


def label_bandwidth(axes: "Axes", hardware: HardwareProfile, beyond: float, ridge: float) -> None:
    """Write the memory rate along its roof, between the decode points and the ridge.

    Needs the final layout: the angle of a slope on a log-log page depends on the page.
    """
    bandwidth = hardware.hbm_bytes_per_s
    bottom = axes.get_ylim()[0]
    start = max(axes.get_xlim()[0], bottom / bandwidth, min(beyond, ridge / 4))
    # A little left of the middle: the roofs begin, and are named, at the right.
    x = math.exp(0.6 * math.log(start) + 0.4 * math.log(ridge))
    (x0, y0), (x1, y1) = axes.transData.transform([(x, x * bandwidth), (2 * x, 2 * x * bandwidth)])
    axes.annotate(
        f"memory {format_si(bandwidth, 'B/s')}",
        (x, x * bandwidth),
        xytext=(-3, 4),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        ha="center",
        color=GREY,
        fontsize=7.5,
    )


def _measured_roof(hardware: HardwareProfile, dtype: str) -> tuple[float, float] | None:
    """Peak and bandwidth of the measured roof; a side that was not measured is the datasheet's."""
    compute, memory = calibrated_rates(hardware, dtype)
    if compute is None and memory is None:
        return None
    return (
        compute if compute is not None else hardware.peak(dtype),
        memory if memory is not None else hardware.hbm_bytes_per_s,
    )


def _draw_measured(axes: "Axes", hardware: HardwareProfile, dtype: str) -> None:
    rates = _measured_roof(hardware, dtype)
    if rates is None:
        return
    peak, bandwidth = rates
    left, right = axes.get_xlim()
    ridge = peak / bandwidth
    axes.plot(
        [min(left, ridge), ridge, max(right, ridge)],
        [min(left, ridge) * bandwidth, peak, peak],
        gid=f"measured-{dtype}",
        **_MEASURED_STYLE,
    )
