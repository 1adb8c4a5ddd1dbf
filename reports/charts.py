"""The interactive charts of the page as plain data: series, axes and what hovering says.

The same series as the static figures; the page's script only draws them. Series names and texts are
data, never markup. ``r`` is the row of the ranked table that a point is about.
"""

import math
from collections.abc import Sequence
from typing import Any

from reports.axes import AXES
from reports.comparison import Pair, metric_errors
from reports.curves import CurvePoint, CurveSeries, crossings, curve_series
from reports.figures.curves import MOST_BANDS
from reports.labels import safe_text
from reports.points import Namer

Spec = dict[str, Any]
#: Metrics with a curve of their own, in the order of the page.
CURVES = (
    *("ttft_s", "tpot_s", "tokens_per_s", "energy_j_per_token"),
    *("usd_per_million_output_tokens", "max_batch"),
)
#: Series can be switched on and off here, so more of them are bearable than in a static figure.
MOST_SERIES = 48
_PHASE_OF_METRIC = {
    "ttft_s": "prefill",
    "tpot_s": "decode",
    "tokens_per_s": "decode",
    "energy_j_per_token": "decode",
    "usd_per_million_output_tokens": "decode",
}


class Colours:
    """One colour number for every series name, the same in all charts of a page.

    The page draws those it has a colour for at first; the others are a click away.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @classmethod
    def by_rank(cls, ranked: Sequence[Pair]) -> "Colours":
        """Low numbers for the full cache and the methods that rank best."""
        colours = cls()
        namer = Namer.fitting(ranked, MOST_SERIES)
        for is_full in (True, False):
            for pair in ranked:
                if (pair.key.text("method") == "full") == is_full:
                    colours(namer(pair))
        return colours

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
            chart_series(
                "break-even",
                "cross",
                [(c.context_tokens, c.value, -1, "") for c in met],
                tips=[f"from here {c.better} beats {c.worse}" for c in met],
            )
        )
    if limit is not None:
        ends = [x for s in drawn for x in s["x"]]
        line = [(x, limit[0], -1, "") for x in (min(ends), max(ends))]
        drawn.append(chart_series(limit[1], "guide", line))
    return {
        "title": f"{text.title} against context",
        "x": {"label": "context (tokens)", "unit": "tokens", "log": 2},
        "y": {"label": text.label, "unit": text.unit, "log": 2 if text.unit == "B" else 10},
        "series": drawn,
        "omitted": max(0, len(series) - MOST_SERIES),
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
        chart_series(
            "exact" if not off else f"{off:+.0%}".replace("%", " %"),
            "guide" if off else "roof",
            [(low, low * (1 + off), -1, ""), (high, high * (1 + off), -1, "")],
        )
        for off in (0.0, 0.2, -0.2, 0.1, -0.1)
    ]
    grouped: dict[tuple[str, str], list[tuple[float, float, int, str]]] = {}
    for e in errors:
        key = (namer(e.pair), e.pair.key.text("level"))
        tip = f"error {100 * e.error:+.1f} %"
        grouped.setdefault(key, []).append((e.observed, e.predicted, row_of(e.pair, rows), tip))
    for (name, level), found in list(grouped.items())[:MOST_SERIES]:
        drawn.append(chart_series(series_label(name, level), "ring", found, colour=colours(name)))
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
            grouped.setdefault(key, []).append((cost, drop, row_of(p, rows), ""))
    if not grouped:
        return None
    return {
        "title": "Cost against accuracy, all contexts",
        "x": {"label": AXES[metric].label, "unit": "US$", "log": 10},
        "y": {"label": "accuracy given up (points)", "unit": "points", "log": 0},
        "series": [
            chart_series(series_label(name, level), "ring", found, colour=colours(name))
            for (name, level), found in list(grouped.items())[:MOST_SERIES]
        ],
    }


def _curve_lines(
    s: CurveSeries, metric: str, rows: dict[int, int], colour: int, with_band: bool
) -> list[Spec]:
    phase = _PHASE_OF_METRIC.get(metric, "")
    lines = [
        chart_series(
            s.label,
            "line" if s.is_path else "ring",
            [
                (p.context_tokens, p.predicted, row_of(p.pair, rows), _tip(p, metric, phase))
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
        lines[0]["lo"] = [short_number(interval[c][0]) for c in ends]
        lines[0]["hi"] = [short_number(interval[c][1]) for c in ends]
        lines[0]["bx"] = [short_number(c) for c in ends]
    seen = [
        (p.context_tokens, p.observed, row_of(p.pair, rows), _seen(p, metric))
        for p in s.points
        if p.observed
    ]
    lines.append(chart_series(s.label, "dot", seen, colour=colour, level=s.level))
    return [line for line in lines if line["x"]]


def chart_series(
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
        x = short_number(points[n][0]) or 0.0
        xs.append(x if not xs or x > xs[-1] else xs[-1] * (1 + 1e-9) + 1e-300)
    return {
        "label": label,
        "role": role,
        "colour": colour,
        "dash": level == "reference",
        "x": xs,
        "y": [short_number(points[n][1]) for n in order],
        "r": [points[n][2] for n in order],
        "t": [texts[n] for n in order],
    }


def short_number(value: float | None) -> float | None:
    """Seven significant digits: more than any reader can see, half the bytes."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def row_of(pair: Pair, rows: dict[int, int]) -> int:
    """Row of the ranked table that is about a pair; -1 where there is none."""
    return rows.get(id(pair), -1)


def _tip(p: CurvePoint, metric: str, phase: str) -> str:
    """The regime and the interval of a point."""
    text = AXES[metric].format
    parts = [_bound(p.pair, phase)]
    if p.low and p.high:
        parts.append(f"{text(p.low)} to {text(p.high)}")
    return ", ".join(part for part in parts if part)


def _seen(p: CurvePoint, metric: str) -> str:
    """Say that a point was observed, and how surely."""
    if p.observed_interval is None:
        return "observed"
    low, high = map(AXES[metric].format, p.observed_interval)
    return f"observed, median within {low} to {high} (95 %)"


def _bound(pair: Pair, phase: str) -> str:
    bound = pair.predicted.text(f"{phase}_bound") if pair.predicted is not None and phase else ""
    return f"{safe_text(bound, 20)}-bound" if bound else ""


def series_label(name: str, level: str) -> str:
    """Name with its level, as legends say it."""
    return f"{name} ({level})" if level else name


def _has_positive(series: CurveSeries) -> bool:
    return any(v and v > 0 for p in series.points for v in (p.predicted, p.observed))
