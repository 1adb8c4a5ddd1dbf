"""The interactive roofline as data: roofs, rings, dots and the lines that join them."""

from collections.abc import Sequence

from costmodel.hardware import HardwareProfile
from reports.charts import (
    MOST_SERIES,
    Colours,
    Spec,
    chart_series,
    row_of,
    series_label,
    short_number,
)
from reports.comparison import Pair
from reports.figures.roofs import calibrated_rates
from reports.labels import safe_text
from reports.points import RooflineSeries, roofline_series


def roofline_chart(
    pairs: Sequence[Pair], hardware: HardwareProfile, rows: dict[int, int], colours: Colours
) -> Spec | None:
    """Attained FLOP/s over arithmetic intensity with the roofs of one device."""
    series = roofline_series(pairs, hardware, MOST_SERIES)[: 2 * MOST_SERIES]
    if not series:
        return None
    points = [p for s in series for p in s.points]
    used = {p.pair.key.text("dtype") for p in points}
    left = min(p.intensity for p in points) / 3
    right = 3 * max(
        max(p.intensity for p in points),
        max(hardware.peak_flops_per_s.values()) / hardware.hbm_bytes_per_s,
    )
    drawn = _roof_lines(hardware, used, left, right)
    joins = []
    for s in series:
        colour = colours(s.name)
        drawn += _roofline_lines(s, rows, colour)
        joins += [
            [short_number(p.intensity), short_number(p.predicted), short_number(p.observed), colour]
            for p in s.points
            if p.predicted and p.observed
        ]
    return {
        "title": f"Roofline of {safe_text(hardware.title, 60)}",
        "x": {"label": "arithmetic intensity (FLOP per HBM byte)", "unit": "FLOP/B", "log": 10},
        "y": {"label": "attained, per device (FLOP/s)", "unit": "FLOP/s", "log": 10},
        "series": drawn,
        "joins": joins,
    }


def _roofline_lines(s: RooflineSeries, rows: dict[int, int], colour: int) -> list[Spec]:
    label = series_label(s.name, s.level)
    tip = {id(p): f"{s.phase}{', ' + p.bound + '-bound' if p.bound else ''}" for p in s.points}
    made = [
        chart_series(
            label,
            "line" if s.is_path else "ring",
            [
                (p.intensity, p.predicted, row_of(p.pair, rows), tip[id(p)])
                for p in s.points
                if p.predicted
            ],
            colour=colour,
            level=s.level,
        ),
        chart_series(
            label,
            "dot",
            [
                (p.intensity, p.observed, row_of(p.pair, rows), f"{s.phase}, observed")
                for p in s.points
                if p.observed
            ],
            colour=colour,
            level=s.level,
        ),
    ]
    return [line for line in made if line["x"]]


def _roof_lines(hardware: HardwareProfile, used: set[str], left: float, right: float) -> list[Spec]:
    """Roofs as lines: datasheet peaks by dtype, and the measured one where there is one."""
    roofs: dict[tuple[float, float], list[str]] = {}
    for dtype, peak in hardware.peak_flops_per_s.items():
        roofs.setdefault((peak, hardware.hbm_bytes_per_s), []).append(dtype)
    drawn = [
        _roof(
            ", ".join(names),
            peak,
            bandwidth,
            left,
            right,
            role="roof" if used & {*names} else "faint",
        )
        for (peak, bandwidth), names in sorted(roofs.items())
    ]
    for dtype in sorted(used & set(hardware.peak_flops_per_s)):
        compute, memory = calibrated_rates(hardware, dtype)
        if compute or memory:
            peak, bandwidth = compute or hardware.peak(dtype), memory or hardware.hbm_bytes_per_s
            drawn.append(_roof(f"measured {dtype}", peak, bandwidth, left, right, role="guide"))
    return drawn


def _roof(name: str, peak: float, bandwidth: float, left: float, right: float, role: str) -> Spec:
    ridge = peak / bandwidth
    xs = sorted({min(left, ridge), ridge, right})
    points = [(x, min(peak, x * bandwidth), -1, f"roof of {name}") for x in xs]
    return chart_series(f"roof: {name}", role, points)
