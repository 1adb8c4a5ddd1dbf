"""Metrics against context: one line a method, the interval as a band, crossings named."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reports.axes import AXES
from reports.comparison import Points, as_pairs
from reports.curves import Crossing, CurveSeries, crossings, curve_series
from reports.figures.legend import band, cross, dot, handles_of, legend_below, ring
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
from reports.labels import tokens
from reports.points import MOST_SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMED_CROSSINGS = 6
#: More bands than this make one grey cloud.
MOST_BANDS = 8


def curve(
    points: Points, metric: str, *, size: tuple[float, float] = WIDE, title: str = ""
) -> "Figure":
    """``metric`` (a key of ``reports.axes.AXES``) against context, log-log, per method.

    Lines with rings are predictions, bands their low to high, dots observations; a cross marks
    where one method starts to beat another, with the context and both names.
    """
    pairs = as_pairs(points)
    axis_text = AXES[metric]
    with house_style():
        series = curve_series(pairs, metric)
        figure, axes = new_figure(size)
        drawn = [s for s in series if any(_values(s))][:MOST_SERIES]
        if not drawn:
            say_empty(axes, f"no point has a {axis_text.title}: nothing to draw")
            return figure
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        styles = SeriesStyle()
        with_bands = len(drawn) <= MOST_BANDS
        for s in drawn:
            _draw(axes, s, styles(s.name, s.level), with_bands and s.is_path)
        same = " (the same for all, within 2 %)" if _all_same(drawn) else ""
        title_of(axes, title or f"{axis_text.title} against context{same}")
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel(axis_text.label)
        _ticks(axes, drawn, metric)
        met = crossings(drawn, metric)
        _mark_nothing_fits(axes, drawn)
        _legend(figure, axes, drawn, met, len(series) - len(drawn))
        _name_crossings(axes, drawn, met)
        return figure


def ttft(points: Points, *, size: tuple[float, float] = WIDE) -> "Figure":
    """TTFT against context."""
    return curve(points, "ttft_s", size=size)


def tpot(points: Points, *, size: tuple[float, float] = WIDE) -> "Figure":
    """TPOT against context."""
    return curve(points, "tpot_s", size=size)


def throughput(points: Points, *, size: tuple[float, float] = WIDE) -> "Figure":
    """Output tokens per second against context."""
    return curve(points, "tokens_per_s", size=size)


def energy(points: Points, *, size: tuple[float, float] = WIDE) -> "Figure":
    """Joules per generated token against context."""
    return curve(points, "energy_j_per_token", size=size)


def cost(points: Points, *, size: tuple[float, float] = WIDE) -> "Figure":
    """US dollars per million output tokens against context."""
    return curve(points, "usd_per_million_output_tokens", size=size)


def max_batch(points: Points, *, size: tuple[float, float] = WIDE) -> "Figure":
    """Most sequences that fit against context."""
    return curve(points, "max_batch", size=size)


def _all_same(series: Sequence[CurveSeries]) -> bool:
    """Lines on top of each other: no method changes this metric, and the title says so."""
    paths = [dict(s.path) for s in series if s.path]
    shared = set.intersection(*(set(p) for p in paths)) if len(paths) > 1 else set()
    return bool(shared) and all(
        max(p[c] for p in paths) <= 1.02 * min(p[c] for p in paths) for c in shared
    )


def _values(series: CurveSeries) -> list[float]:
    return [v for p in series.points for v in (p.predicted, p.observed) if v is not None and v > 0]


def _draw(axes: "Axes", series: CurveSeries, look: dict[str, Any], with_band: bool) -> None:
    path = [(c, v) for c, v in series.path if v > 0]
    if not series.is_path:
        path = [(p.context_tokens, p.predicted) for p in series.points if p.predicted]
    if path:
        axes.plot(
            *zip(*path, strict=True),
            color=look["color"],
            linestyle=look["linestyle"] if series.is_path else "none",
            linewidth=1.3,
            marker=look["marker"],
            markerfacecolor="white",
            markeredgewidth=1.2,
            label=series.label,
            gid="predicted",
            zorder=3,
        )
    bounds = {
        p.context_tokens: (p.low, p.high) for p in series.points if p.low and p.high is not None
    }
    if bounds and with_band:
        contexts = sorted(bounds)
        low, high = zip(*(bounds[c] for c in contexts), strict=True)
        axes.fill_between(
            contexts, low, high, color=look["color"], alpha=0.10, linewidth=0, gid="interval"
        )
    seen = [(p.context_tokens, p.observed) for p in series.points if p.observed]
    if seen:
        axes.plot(
            *zip(*seen, strict=True),
            linestyle="none",
            marker=look["marker"],
            markersize=4.5,
            color=look["color"],
            label="_" if path else series.label,
            gid="observed",
            zorder=4,
        )
    spread = [
        (p.context_tokens, *p.observed_interval) for p in series.points if p.observed_interval
    ]
    if spread:
        contexts_, low_, high_ = zip(*spread, strict=True)
        axes.vlines(contexts_, low_, high_, color=look["color"], linewidth=2.2, gid="confidence")


def _ticks(axes: "Axes", series: Sequence[CurveSeries], metric: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    contexts = sorted({p.context_tokens for s in series for p in s.points})
    low, high = math.log2(contexts[0]), math.log2(contexts[-1])
    step = max(1, math.ceil((high - low) / 8))
    powers = [2.0**n for n in range(math.ceil(low), math.floor(high) + 1, step)]
    axes.xaxis.set_major_locator(FixedLocator(powers if len(powers) > 1 else contexts[:8]))
    axes.xaxis.set_minor_locator(NullLocator())
    format_axis(axes.xaxis, tokens)
    margin = max((high - low) * 0.06, 0.3)
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    bottom, top = axes.get_ylim()
    log_ticks(axes.yaxis, (bottom, top), most=8, base=2.0 if AXES[metric].unit == "B" else 10.0)
    axes.set_ylim(bottom, top)
    format_axis(axes.yaxis, AXES[metric].format)


def _mark_nothing_fits(axes: "Axes", series: Sequence[CurveSeries]) -> None:
    """Zero has no place on a log axis: a cross at the foot says that nothing fits there."""
    zero = sorted({p.context_tokens for s in series for p in s.points if p.predicted == 0})
    if not zero:
        return
    axes.plot(
        zero,
        [0.015] * len(zero),
        linestyle="none",
        marker="x",
        color=GREY,
        transform=axes.get_xaxis_transform(),
        gid="nothing-fits",
        label="_",
    )
    for context in zero:
        names = [s.label for s in series if any(_is_zero_at(p, context) for p in s.points)]
        text = names[0] if len(names) == 1 else f"{len(names)} methods"
        axes.annotate(
            f"none fits:\n{text}",
            (context, 0.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 12),
            textcoords="offset points",
            ha="center",
            color=GREY,
            fontsize=7.5,
        )


def _is_zero_at(p: Any, context: float) -> bool:
    return bool(p.predicted == 0 and p.context_tokens == context)


def _legend(
    figure: "Figure",
    axes: "Axes",
    series: Sequence[CurveSeries],
    met: Sequence[Crossing],
    left_out: int,
) -> None:
    points = [p for s in series for p in s.points]
    keys: list[Any] = []
    if any(p.observed for p in points):
        keys += [ring(), dot()]
    if any(c.get_gid() == "interval" for c in axes.collections):
        keys.append(band("band: low to high"))
    if met:
        keys.append(cross("cross: break-even"))
    if left_out > 0:
        keys.append(cross(f"{left_out} more series not drawn"))
        keys[-1].set_marker("")
    legend_below(figure, [*handles_of([axes]).values(), *keys])


def _name_crossings(axes: "Axes", series: Sequence[CurveSeries], met: Sequence[Crossing]) -> None:
    for c in met:
        axes.plot(
            [c.context_tokens],
            [c.value],
            linestyle="none",
            marker="x",
            markersize=7,
            markeredgewidth=1.6,
            color="black",
            zorder=5,
            gid="break-even",
            label="_",
        )
    taken = [(p.context_tokens, v) for s in series for p in s.points for v in (p.predicted,) if v]
    placer = Placer(axes, [*taken, *((c.context_tokens, c.value) for c in met)])
    for together in _clusters(met)[:_MOST_NAMED_CROSSINGS]:
        c = together[0]
        text = f"from {round_tokens(c.context_tokens)}: {c.better}\nbeats {c.worse}"
        if len(together) > 1:
            text += f"\n(and {len(together) - 1} more here)"
        placer.place([(c.context_tokens, c.value)], text, fontsize=7.5)


def _clusters(met: Sequence[Crossing]) -> list[list[Crossing]]:
    """Crossings that fall on one spot share a label."""
    clusters: list[list[Crossing]] = []
    for c in met:
        for cluster in clusters:
            first = cluster[0]
            apart = abs(math.log(c.context_tokens / first.context_tokens))
            if apart < 0.05 and abs(math.log(c.value / first.value)) < 0.05:
                cluster.append(c)
                break
        else:
            clusters.append([c])
    return clusters


def round_tokens(value: float) -> str:
    """A crossing is read off two straight lines: three digits at most."""
    return f"{float(f'{value:.2g}'):,.0f}"
