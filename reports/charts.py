"""The interactive charts of the page as plain data: series, axes and what hovering says.

The same series as the static figures; the page's script only draws them. Series names and texts are
data, never markup. ``r`` is the row of the ranked table that a point is about.
"""

import math
from collections.abc import Sequence
from typing import Any

from costmodel.hardware import HardwareProfile
from reports.axes import AXES
from reports.comparison import Pair, metric_errors
from reports.curves import CurvePoint, CurveSeries, crossings, curve_series
from reports.figures.curves import MOST_BANDS
from reports.figures.roofs import calibrated_rates
from reports.labels import safe_text
from reports.points import Namer, RooflineSeries, roofline_series

Spec = dict[str, Any]
#: Metrics with a curve of their own, in the order of the page.
CURVES = (
    *("ttft_s", "tpot_s", "tokens_per_s", "energy_j_per_token"),
    *("usd_per_million_output_tokens", "max_batch"),
)
#: Series can be switched off here, so more of them are bearable than in a static figure.
MOST_SERIES = 24
_PHASE_OF_METRIC = {
    "ttft_s": "prefill",
    "tpot_s": "decode",
    "tokens_per_s": "decode",
    "energy_j_per_token": "decode",
    "usd_per_million_output_tokens": "decode",
}


class Colours:
    """One colour number for every series name, the same in all charts of a page."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        """Number of a name; the page maps numbers to colours."""
        return self._numbers.setdefault(name, len(self._numbers))


def curve_chart(
    pairs: Sequence[Pair],
    metric: str,
    rows: dict[int, int],
    colours: Colours,
    limit: tuple[float, str] | None = None,
) -> Spec | None:
    """A metric against context, with a named limit line; None where no point has the metric."""
    text = AXES[metric]
    series = [s for s in curve_series(pairs, metric, MOST_SERIES) if _has_positive(s)]
    if not series:
        return None
    drawn: list[Spec] = []
    with_bands = len(series) <= MOST_BANDS
    for s in series[:MOST_SERIES]:
        drawn += _curve_lines(s, metric, rows, colours(s.name), with_bands and s.is_path)
    met = crossings(series[:MOST_SERIES], metric)
    if met:
        drawn.append(
            _series(
                "break-even",
                "cross",
                [(c.context_tokens, c.value, -1, "") for c in met],
                tips=[f"from here {c.better} beats {c.worse}" for c in met],
            )
        )
    if limit is not None:
        ends = [x for s in drawn for x in s["x"]]
        line = [(x, limit[0], -1, "") for x in (min(ends), max(ends))]
        drawn.append(_series(limit[1], "guide", line))
    return {
        "title": f"{text.title} against context",
        "x": {"label": "context (tokens)", "unit": "tokens", "log": 2},
        "y": {"label": text.label, "unit": text.unit, "log": 2 if text.unit == "B" else 10},
        "series": drawn,
        "omitted": max(0, len(series) - MOST_SERIES),
    }


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
            [_number(p.intensity), _number(p.predicted), _number(p.observed), colour]
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


def scatter_chart(
    pairs: Sequence[Pair], metric: str, rows: dict[int, int], colours: Colours
) -> Spec | None:
    """Predicted over observed, with lines at 0, 10 and 20 percent error."""
    namer, text = Namer.fitting(pairs, MOST_SERIES), AXES[metric]
    errors = [
        e
        for p in pairs
        for e in metric_errors(p)
        if e.metric == metric and e.predicted > 0 < e.observed
    ]
    if not errors:
        return None
    values = [v for e in errors for v in (e.predicted, e.observed)]
    low, high = min(values) / 1.5, max(values) * 1.5
    drawn = [
        _series(
            "exact" if not off else f"{off:+.0%}".replace("%", " %"),
            "guide",
            [(low, low * (1 + off), -1, ""), (high, high * (1 + off), -1, "")],
        )
        for off in (0.0, 0.1, -0.1, 0.2, -0.2)
    ]
    grouped: dict[tuple[str, str], list[tuple[float, float, int, str]]] = {}
    for e in errors:
        key = (namer(e.pair), e.pair.key.text("level"))
        tip = f"error {100 * e.error:+.1f} %"
        grouped.setdefault(key, []).append((e.observed, e.predicted, _row(e.pair, rows), tip))
    for (name, level), found in list(grouped.items())[:MOST_SERIES]:
        drawn.append(_series(_label(name, level), "ring", found, colour=colours(name)))
    return {
        "title": f"{text.title}: predicted against observed",
        "x": {"label": f"observed {text.label}", "unit": text.unit, "log": 10},
        "y": {"label": f"predicted {text.label}", "unit": text.unit, "log": 10},
        "series": drawn,
    }


def pareto_chart(pairs: Sequence[Pair], rows: dict[int, int], colours: Colours) -> Spec | None:
    """Cost against accuracy given up, every point with both."""
    metric, namer = "usd_per_million_output_tokens", Namer.fitting(pairs, MOST_SERIES)
    grouped: dict[tuple[str, str], list[tuple[float, float, int, str]]] = {}
    for p in pairs:
        cost, drop = p.value(metric), p.value("accuracy_drop_points")
        if cost and drop is not None:
            key = (namer(p), p.key.text("level"))
            grouped.setdefault(key, []).append((cost, drop, _row(p, rows), ""))
    if not grouped:
        return None
    return {
        "title": "Cost against accuracy, all contexts",
        "x": {"label": AXES[metric].label, "unit": "US$", "log": 10},
        "y": {"label": "accuracy given up (points)", "unit": "points", "log": 0},
        "series": [
            _series(_label(name, level), "ring", found, colour=colours(name))
            for (name, level), found in list(grouped.items())[:MOST_SERIES]
        ],
    }


def _curve_lines(
    s: CurveSeries, metric: str, rows: dict[int, int], colour: int, with_band: bool
) -> list[Spec]:
    phase = _PHASE_OF_METRIC.get(metric, "")
    lines = [
        _series(
            s.label,
            "line" if s.is_path else "ring",
            [
                (p.context_tokens, p.predicted, _row(p.pair, rows), _tip(p, metric, phase))
                for p in s.points
                if p.predicted
            ],
            colour=colour,
            level=s.level,
        )
    ]
    interval = {p.context_tokens: (p.low, p.high) for p in s.points if p.low and p.high}
    if interval and with_band:
        ends = sorted(interval)
        lines[0]["lo"] = [_number(interval[c][0]) for c in ends]
        lines[0]["hi"] = [_number(interval[c][1]) for c in ends]
        lines[0]["bx"] = [_number(c) for c in ends]
    seen = [
        (p.context_tokens, p.observed, _row(p.pair, rows), "observed")
        for p in s.points
        if p.observed
    ]
    lines.append(_series(s.label, "dot", seen, colour=colour, level=s.level))
    return [line for line in lines if line["x"]]


def _roofline_lines(s: RooflineSeries, rows: dict[int, int], colour: int) -> list[Spec]:
    label = _label(s.name, s.level)
    tip = {id(p): f"{s.phase}{', ' + p.bound + '-bound' if p.bound else ''}" for p in s.points}
    made = [
        _series(
            label,
            "line" if s.is_path else "ring",
            [
                (p.intensity, p.predicted, _row(p.pair, rows), tip[id(p)])
                for p in s.points
                if p.predicted
            ],
            colour=colour,
            level=s.level,
        ),
        _series(
            label,
            "dot",
            [
                (p.intensity, p.observed, _row(p.pair, rows), f"{s.phase}, observed")
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
    return _series(f"roof: {name}", role, points)


def _series(
    label: str,
    role: str,
    points: Sequence[tuple[float, float | None, int, str]],
    *,
    colour: int = -1,
    level: str = "",
    tips: Sequence[str] = (),
) -> Spec:
    """Points by rising x, no two the same: what the chart library needs to align series."""
    texts = list(tips) or [p[3] for p in points]
    order = sorted(range(len(points)), key=lambda n: points[n][0])
    xs: list[float] = []
    for n in order:
        x = _number(points[n][0]) or 0.0
        xs.append(x if not xs or x > xs[-1] else xs[-1] * (1 + 1e-9) + 1e-300)
    return {
        "label": label,
        "role": role,
        "colour": colour,
        "dash": level == "reference",
        "x": xs,
        "y": [_number(points[n][1]) for n in order],
        "r": [points[n][2] for n in order],
        "t": [texts[n] for n in order],
    }


def _number(value: float | None) -> float | None:
    """Seven significant digits: more than any reader can see, half the bytes."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def _row(pair: Pair, rows: dict[int, int]) -> int:
    return rows.get(id(pair), -1)


def _tip(p: CurvePoint, metric: str, phase: str) -> str:
    """The regime and the interval of a point."""
    text = AXES[metric].format
    parts = [_bound(p.pair, phase)]
    if p.low and p.high:
        parts.append(f"{text(p.low)} to {text(p.high)}")
    return ", ".join(part for part in parts if part)


def _bound(pair: Pair, phase: str) -> str:
    bound = pair.predicted.text(f"{phase}_bound") if pair.predicted is not None and phase else ""
    return f"{safe_text(bound, 20)}-bound" if bound else ""


def _label(name: str, level: str) -> str:
    return f"{name} ({level})" if level else name


def _has_positive(series: CurveSeries) -> bool:
    return any(v and v > 0 for p in series.points for v in (p.predicted, p.observed))
