"""What a method costs against the accuracy it gives up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reports.axes import AXES
from reports.comparison import Pair, Points, as_pairs
from reports.figures.legend import handles_of, legend_below
from reports.figures.memory import shared_point
from reports.figures.placing import Placer
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
from reports.labels import point
from reports.points import Namer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Beyond this ratio of dearest to cheapest a linear axis would press the cheap ones together.
_LOG_FROM_RATIO = 6.0


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other point beats in both numbers (smaller is better), by the first."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def pareto(
    points: Points,
    metric: str = "usd_per_million_output_tokens",
    *,
    size: tuple[float, float] = WIDE,
) -> "Figure":
    """``metric`` against the points of accuracy given up, at the point most methods share.

    The step line is the frontier: nothing left of and below it. Methods without evidence stand in
    the strip on top: their accuracy is unknown, not zero.
    """
    pairs = as_pairs(points)
    with house_style():
        figure, axes = new_figure(size)
        place = shared_point(pairs) if pairs else None
        here = [
            p
            for p in pairs
            if (p.key.number("context_tokens"), p.key.number("batch"), p.key.text("model")) == place
            and p.value(metric) is not None
        ]
        if not here:
            say_empty(axes, f"no prediction has a {AXES[metric].title}: nothing to draw")
            return figure
        known = [p for p in here if p.value("accuracy_drop_points") is not None]
        drops = [p.value("accuracy_drop_points") or 0.0 for p in known]
        top = max([1.0, *drops]) * 1.25
        bottom = min([0.0, *drops]) - 0.08 * top
        unknown_at = top * 1.12
        _draw_points(axes, here, metric, unknown_at)
        edge = frontier([(p.value(metric) or 0.0, d) for p, d in zip(known, drops, strict=True)])
        if edge:
            axes.step(*zip(*edge, strict=True), where="post", color=GREY, lw=1.0, gid="frontier")
        if len(known) < len(here):
            axes.axhline(top, color=GREY, linewidth=0.8, linestyle=":")
            axes.axhspan(top, top * 1.24, color=GREY, alpha=0.07, linewidth=0)
        axes.set_ylim(bottom, top * 1.24 if len(known) < len(here) else top)
        _cost_axis(axes, [p.value(metric) or 0.0 for p in here], metric)
        where = point(here[0].key, ("context_tokens", "batch", "model"))
        title_of(axes, f"Cost against accuracy: {where}")
        axes.set_xlabel(AXES[metric].label)
        axes.set_ylabel("accuracy given up (points of the benchmark's score)")
        if len(known) < len(here):
            axes.annotate(
                "accuracy unknown",
                (0.0, unknown_at),
                xycoords=axes.get_yaxis_transform(),
                xytext=(4, 6),
                textcoords="offset points",
                color=GREY,
                fontsize=7.5,
            )
        legend_below(figure, handles_of([axes]).values())
        _name_points(axes, here, metric, unknown_at)
        return figure


def _cost_axis(axes: "Axes", costs: Sequence[float], metric: str) -> None:
    """Linear from zero, or logarithmic where one method costs many times another."""
    low, high = min(costs), max(costs)
    if low > 0 and high / low > _LOG_FROM_RATIO:
        axes.set_xscale("log")
        limits = (low / 1.3, high * 1.8)
        log_ticks(axes.xaxis, limits, most=8)
    else:
        limits = (0.0, high * 1.25 or 1.0)
    axes.set_xlim(limits)
    format_axis(axes.xaxis, AXES[metric].format)


def _series_label(pair: Pair, namer: Namer) -> str:
    level = pair.key.text("level")
    return f"{namer(pair)} ({level})" if level else namer(pair)


def _draw_points(axes: "Axes", here: Sequence[Pair], metric: str, unknown_at: float) -> None:
    styles, namer = SeriesStyle(), Namer(here)
    for p in here:
        level = p.key.text("level")
        name = namer(p)
        look = styles(name, level)
        drop = p.value("accuracy_drop_points")
        axes.plot(
            [p.value(metric) or 0.0],
            [unknown_at if drop is None else drop],
            linestyle="none",
            marker=look["marker"],
            markersize=8,
            color=look["color"],
            markerfacecolor="none",
            markeredgewidth=1.4,
            label=_series_label(p, namer),
            gid="unknown" if drop is None else "known",
        )


def _name_points(axes: "Axes", here: Sequence[Pair], metric: str, unknown_at: float) -> None:
    namer = Namer(here)
    anchors = []
    for p in here:
        drop = p.value("accuracy_drop_points")
        anchors.append((p.value(metric) or 0.0, unknown_at if drop is None else drop))
    placer = Placer(axes, anchors)
    for p, anchor in zip(here, anchors, strict=True):
        placer.place([anchor], _series_label(p, namer), fontsize=7.5)
