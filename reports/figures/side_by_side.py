"""A metric at one context: a row a method, best on top, with intervals and observations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reports.axes import AXES
from reports.comparison import Points, as_pairs
from reports.curves import CurvePoint, CurveSeries, curve_series
from reports.figures.legend import WIDE_FROM_INCHES, legend_below
from reports.figures.style import (
    COLOURS,
    GREY,
    LINE_OF_LEVEL,
    WIDE,
    format_axis,
    house_style,
    log_ticks,
    new_figure,
    say_empty,
    title_of,
)
from reports.labels import safe_text, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS = 28
#: Colour and marker of a level; other levels take the first.
_LOOKS = {"ideal": (COLOURS[1], "o"), "reference": (COLOURS[2], "s")}


def side_by_side(points: Points, metric: str, *, size: tuple[float, float] = WIDE) -> "Figure":
    """``metric`` (a key of ``reports.axes.AXES``) of every method, where all have one context.

    A row is one method: rings are predictions with their low to high, a ring a level; dots are
    observations. Rows are sorted by the better of their levels, the best on top.
    """
    pairs = as_pairs(points)
    text = AXES[metric]
    with house_style():
        figure, axes = new_figure(size)
        rows = _rows(curve_series(pairs, metric, None), text.lower_is_better)
        if not rows:
            say_empty(axes, f"no point has a {text.title}: nothing to draw")
            return figure
        shown = rows[:_MOST_ROWS]
        axes.set_xscale("log")
        for n, (_, members) in enumerate(shown):
            for s in members:
                for p in s.points:
                    _draw(axes, n, s.level, p)
        _mark_full(axes, shown)
        axes.set_yticks(range(len(shown)), [safe_text(name, 36) for name, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        left, right = axes.get_xlim()
        most = 8 if size[0] >= WIDE_FROM_INCHES else 5
        log_ticks(axes.xaxis, (left, right), most=most, base=2.0 if text.unit == "B" else 10.0)
        axes.set_xlim(left, right)
        format_axis(axes.xaxis, text.format)
        axes.set_xlabel(text.label)
        context = shown[0][1][0].points[0].context_tokens
        title_of(axes, f"{text.title} at {tokens(context)} tokens of context")
        _legend(figure, shown, len(rows) - len(shown))
        return figure


def _rows(
    series: Sequence[CurveSeries], lower_is_better: bool
) -> list[tuple[str, list[CurveSeries]]]:
    """Series by name, the best value first; names without a value above zero come to nothing."""
    named: dict[str, list[CurveSeries]] = {}
    for s in series:
        if _values(s):
            # Levels of one method share a row, whatever their predictions rest on.
            basis = s.points[0].pair.basis
            named.setdefault(s.name.removesuffix(f" [{basis}]"), []).append(s)
    sign = 1.0 if lower_is_better else -1.0
    return sorted(
        named.items(), key=lambda item: min(sign * v for s in item[1] for v in _values(s))
    )


def _values(series: CurveSeries) -> list[float]:
    """Predictions above zero, or observations where nothing is predicted."""
    predicted = [p.predicted for p in series.points if p.predicted]
    return predicted or [p.observed for p in series.points if p.observed]


def _draw(axes: "Axes", row: int, level: str, p: CurvePoint) -> None:
    colour, marker = _LOOKS.get(level, _LOOKS["ideal"])
    line = LINE_OF_LEVEL.get(level, "-")
    if p.low and p.high:
        axes.plot([p.low, p.high], [row, row], color=colour, linestyle=line, gid="interval")
    if p.predicted:
        axes.plot(
            *([p.predicted], [row]),
            color=colour,
            marker=marker,
            markerfacecolor="white",
            markeredgewidth=1.3,
            linestyle="none",
            gid="predicted",
            zorder=3,
        )
    if p.observed:
        axes.plot(
            *([p.observed], [row]),
            color=colour,
            marker=marker,
            markersize=4.5,
            linestyle="none",
            gid="observed",
            zorder=4,
        )


def _mark_full(axes: "Axes", rows: Sequence[tuple[str, list[CurveSeries]]]) -> None:
    """A line through the full cache: what every method is set against."""
    found = [
        v
        for _, members in rows
        for s in members
        if s.points[0].pair.key.text("method") == "full"
        for v in _values(s)
    ]
    # Models of one method are set against each other, not against one of them.
    if len({s.points[0].pair.key.method_spec for _, m in rows for s in m}) > 1 and found:
        axes.axvline(found[0], color=GREY, linewidth=0.8, linestyle=":", gid="full", zorder=1)


def _legend(
    figure: "Figure", shown: Sequence[tuple[str, list[CurveSeries]]], n_left_out: int
) -> None:
    from matplotlib.lines import Line2D

    series = [s for _, members in shown for s in members]
    handles: list[Any] = []
    for level in dict.fromkeys(s.level for s in series):
        colour, marker = _LOOKS.get(level, _LOOKS["ideal"])
        handles.append(
            Line2D(
                *([], []),
                color=colour,
                marker=marker,
                markerfacecolor="white",
                linestyle=LINE_OF_LEVEL.get(level, "-"),
                label=f"predicted, low to high{f' ({level})' if level else ''}",
            )
        )
    if any(p.observed for s in series for p in s.points):
        handles.append(
            Line2D([], [], color=GREY, marker="o", linestyle="none", label="filled: observed")
        )
    if n_left_out > 0:
        handles.append(
            Line2D([], [], linestyle="none", label=f"{n_left_out} more methods not drawn")
        )
    legend_below(figure, handles)
