"""Predicted against observed, and the signed error by context, batch or method."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.axes import AXES
from reports.comparison import MetricError, Points, as_pairs, metric_errors, parse_fields
from reports.figures.legend import WIDE_FROM_INCHES, handles_of, legend_below
from reports.figures.style import (
    GREY,
    WIDE,
    SeriesStyle,
    format_axis,
    house_style,
    log_ticks,
    new_figure,
    say_empty,
    title_of,
)
from reports.labels import safe_text, tokens
from reports.points import Namer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Shaded around "exact": the tolerance people ask for, and twice that.
BANDS = (0.10, 0.20)
_MOST_CATEGORIES = 24


def error_scatter(
    points: Points,
    metrics: Sequence[str] = ("ttft_s", "tpot_s"),
    *,
    size: tuple[float, float] = WIDE,
) -> "Figure":
    """Predicted over observed, one panel a metric, with bands of 10 % and 20 % error."""
    errors, namer = _errors(points)
    with house_style():
        shown = [m for m in metrics if any(e.metric == m and _is_drawable(e) for e in errors)]
        is_wide = size[0] >= WIDE_FROM_INCHES
        shape = {"ncols": max(1, len(shown))} if is_wide else {"nrows": max(1, len(shown))}
        figure, grid = new_figure(size, squeeze=False, **shape)
        panels = list(np.ravel(grid))
        if not shown:
            say_empty(panels[0], "no record with a prediction has one of these metrics")
            return figure
        styles = SeriesStyle()
        for axes, metric in zip(panels, shown, strict=True):
            mine = [e for e in errors if e.metric == metric and _is_drawable(e)]
            _scatter_panel(axes, mine, metric, namer, styles)
        legend_below(figure, handles_of(panels).values())
        return figure


def error_by(
    points: Points,
    by: str = "context",
    metrics: Sequence[str] = ("ttft_s", "tpot_s"),
    *,
    size: tuple[float, float] = WIDE,
) -> "Figure":
    """Signed error in percent against a field (context, batch, method_spec, ...)."""
    (field,) = parse_fields(by)
    errors, namer = _errors(points)
    with house_style():
        shown = [m for m in metrics if any(e.metric == m and np.isfinite(e.error) for e in errors)]
        figure, grid = new_figure(size, squeeze=False, nrows=max(1, len(shown)), sharex=True)
        panels = list(np.ravel(grid))
        if not shown:
            say_empty(panels[0], "no record with a prediction has one of these metrics")
            return figure
        categories = _categories([e for e in errors if e.metric in shown], field)
        styles = SeriesStyle()
        for axes, metric in zip(panels, shown, strict=True):
            mine = [e for e in errors if e.metric == metric and np.isfinite(e.error)]
            _by_panel(axes, mine, metric, field, categories, namer, styles)
        title_of(panels[0], "Error: predicted too high above zero, too low below; bar: median")
        panels[-1].set_xlabel(_FIELD_LABELS.get(field, field.replace("_", " ")))
        legend_below(figure, handles_of(panels).values())
        return figure


_FIELD_LABELS = {"context_tokens": "context (tokens)", "batch": "batch (sequences)"}


def _errors(points: Points) -> tuple[list[MetricError], Namer]:
    pairs = as_pairs(points)
    return [e for pair in pairs for e in metric_errors(pair)], Namer.fitting(pairs)


def _is_drawable(e: MetricError) -> bool:
    return e.predicted > 0 and e.observed > 0


def _label(e: MetricError, namer: Namer) -> tuple[str, str]:
    return namer(e.pair), e.pair.key.text("level")


def _scatter_panel(
    axes: "Axes", errors: list[MetricError], metric: str, namer: Namer, styles: SeriesStyle
) -> None:
    values = [v for e in errors for v in (e.predicted, e.observed)]
    low, high = min(values) / 1.4, max(values) * 1.4
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = np.array([low, high])
    for tolerance, shade in zip(reversed(BANDS), (0.10, 0.14), strict=True):
        axes.fill_between(
            ends,
            ends * (1 - tolerance),
            ends * (1 + tolerance),
            color=GREY,
            alpha=shade,
            linewidth=0,
            gid=f"band-{tolerance:.0%}",
        )
    axes.plot(ends, ends, color=GREY, linewidth=0.8, gid="exact", label="_")
    for key in dict.fromkeys(_label(e, namer) for e in errors):
        look = styles(*key)
        mine = [e for e in errors if _label(e, namer) == key]
        axes.plot(
            [e.observed for e in mine],
            [e.predicted for e in mine],
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            markerfacecolor="none",
            markeredgewidth=1.2,
            label=f"{key[0]} ({key[1]})" if key[1] else key[0],
            gid="points",
        )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    text = AXES[metric]
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis, (low, high), most=4)
        format_axis(axis, text.format)
    axes.set_xlabel(f"observed {text.label}")
    axes.set_ylabel(f"predicted {text.label}")
    axes.set_title(f"{text.title}: bands ±10 % and ±20 %")


def _categories(errors: list[MetricError], field: str) -> list[Any]:
    values = list(dict.fromkeys(_category(e, field) for e in errors))
    if all(isinstance(v, float) for v in values):
        values.sort()
    return values


def _category(e: MetricError, field: str) -> Any:
    number = e.pair.key.number(field)
    return number if number is not None else safe_text(e.pair.key.text(field, "?"), 28)


def _side_by_side(
    errors: list[MetricError], field: str, namer: Namer
) -> dict[tuple[Any, tuple[str, str]], float]:
    """Shift of every series within every category, so that equal errors stay visible."""
    members: dict[Any, dict[tuple[str, str], None]] = {}
    for e in errors:
        members.setdefault(_category(e, field), {})[_label(e, namer)] = None
    return {
        (value, key): (n - (len(here) - 1) / 2) * 0.6 / len(here)
        for value, here in members.items()
        for n, key in enumerate(here)
    }


def _by_panel(
    axes: "Axes",
    errors: list[MetricError],
    metric: str,
    field: str,
    categories: list[Any],
    namer: Namer,
    styles: SeriesStyle,
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    place = {value: n for n, value in enumerate(categories)}
    series: dict[tuple[str, str], list[tuple[Any, float]]] = {}
    columns: dict[Any, list[float]] = {}
    for e in errors:
        value, percent = _category(e, field), e.error * 100
        series.setdefault(_label(e, namer), []).append((value, percent))
        columns.setdefault(value, []).append(percent)
    for tolerance, shade in zip(reversed(BANDS), (0.10, 0.14), strict=True):
        axes.axhspan(-tolerance * 100, tolerance * 100, color=GREY, alpha=shade, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    beside = _side_by_side(errors, field, namer)
    for key, mine in series.items():
        look = styles(*key)
        axes.plot(
            [place[value] + beside[value, key] for value, _ in mine],
            [percent for _, percent in mine],
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            markerfacecolor="none",
            markeredgewidth=1.2,
            label=f"{key[0]} ({key[1]})" if key[1] else key[0],
            gid="points",
        )
    for value, here in columns.items():
        n = place[value]
        axes.hlines(float(np.median(here)), n - 0.36, n + 0.36, color="black", gid="median")
    reach = max(25.0, 1.15 * max(abs(e.error) * 100 for e in errors))
    axes.set_ylim(-reach, reach)
    axes.set_xlim(-0.5, len(categories) - 0.5)
    step = max(1, -(-len(categories) // _MOST_CATEGORIES))
    texts = [tokens(v) if isinstance(v, float) else v for v in categories]
    axes.xaxis.set_major_locator(FixedLocator(list(range(0, len(categories), step))))
    axes.set_xticklabels(texts[::step])
    if sum(map(len, texts[::step])) > 60:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+.0f} %" if v else "0 %"))
    axes.set_ylabel(f"error of {AXES[metric].title} (%)")
