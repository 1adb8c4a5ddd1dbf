"""The roofline: what the device allows, what was predicted (ring) and what was observed (dot)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from costmodel.hardware import HardwareProfile
from reports.comparison import Points, as_pairs
from reports.figures.legend import (
    WIDE_FROM_INCHES,
    bar,
    dot,
    handles_of,
    legend_below,
    ring,
)
from reports.figures.placing import Placer
from reports.figures.roofs import draw_roofs, label_bandwidth, label_roofs
from reports.figures.style import (
    GREY,
    WIDE,
    SeriesStyle,
    house_style,
    log_ticks,
    new_figure,
    say_empty,
    si_axis,
    title_of,
)
from reports.labels import safe_text, tokens
from reports.points import RooflinePoint, RooflineSeries, roofline_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Ends a stroke within one line object.
_GAP = math.nan


def roofline(
    points: Points,
    hardware: HardwareProfile,
    *,
    size: tuple[float, float] = WIDE,
    title: str = "",
) -> "Figure":
    """Attained FLOP/s over arithmetic intensity, log-log, per GPU.

    Roofs are the datasheet's for every compute dtype; a calibrated profile adds the best measured
    rates. Every pass is a ring (predicted) and a dot (observed) joined by a line; a path joins
    growing contexts; short bars mark what the host link
    or the kernel launches allow. Beside the whole picture stand
    the decode and the prefill points enlarged. Works without observations.
    """
    with house_style():
        pairs = as_pairs(points)
        series = roofline_series(pairs, hardware)
        if not series:
            figure, axes = new_figure(size)
            say_empty(axes, "no point has FLOPs, bytes and a time: nothing to draw")
            return figure
        figure, panels = _panels(size, [s.phase for s in series])
        used = {p.key.text("dtype") for p in pairs}
        styles = SeriesStyle()
        whole = panels["whole"]
        _limits(whole, series, hardware)
        draw_roofs(whole, hardware, used)
        _draw_series(whole, series, styles, scale=0.75)
        title_of(whole, title or f"Roofline of {safe_text(hardware.title, 60)}", share=0.62)
        whole.set_xlabel("arithmetic intensity (useful FLOP per HBM byte)")
        whole.set_ylabel("attained, per device (FLOP/s)")
        for phase in ("decode", "prefill"):
            if phase in panels:
                _draw_zoom(panels[phase], phase, series, hardware, used, styles)
        legend_below(figure, _legend_handles(whole, series))
        figure.draw_without_rendering()
        _label_whole(whole, series, hardware, used)
        for phase in ("decode", "prefill"):
            if phase in panels:
                _label_contexts(panels[phase], [s for s in series if s.phase == phase])
        return figure


def _panels(size: tuple[float, float], phases: Sequence[str]) -> "tuple[Figure, dict[str, Axes]]":
    figure, _ = new_figure(size)
    figure.clear()
    zooms = [p for p in ("decode", "prefill") if p in phases]
    panels: dict[str, Axes]
    if size[0] >= WIDE_FROM_INCHES:
        mosaic = [["whole", zoom] for zoom in zooms]
        panels = figure.subplot_mosaic(mosaic, width_ratios=[1.7, 1])
    else:
        mosaic = [["whole"] * len(zooms), zooms]
        panels = figure.subplot_mosaic(mosaic, height_ratios=[1.5, 1])
    for axes in panels.values():
        axes.set_xscale("log")
        axes.set_yscale("log")
        si_axis(axes.yaxis)
        si_axis(axes.xaxis)
    return figure, panels


def _limits(axes: "Axes", series: Sequence[RooflineSeries], hardware: HardwareProfile) -> None:
    points = [p for s in series for p in s.points]
    peaks = list(hardware.peak_flops_per_s.values())
    ridge = max(peaks) / hardware.hbm_bytes_per_s
    xs = [p.intensity for p in points]
    ys = _heights(points)
    axes.set_xlim(min(*xs, ridge) / 4, max(*xs, ridge) * 4)
    axes.set_ylim(min(ys) / 5, max(*peaks, *ys) * 3)


def _heights(points: Sequence[RooflinePoint]) -> list[float]:
    return [y for p in points for y in (p.predicted, p.observed, p.ceiling) if y]


def _draw_zoom(
    axes: "Axes",
    phase: str,
    series: Sequence[RooflineSeries],
    hardware: HardwareProfile,
    used: set[str],
    styles: SeriesStyle,
) -> None:
    mine = [s for s in series if s.phase == phase]
    points = [p for s in mine for p in s.points]
    xs, ys = [p.intensity for p in points], _heights(points)
    axes.set_xlim(min(xs) / 1.35, max(xs) * 1.5)
    axes.set_ylim(min(ys) / 1.5, max(ys) * 1.6)
    draw_roofs(axes, hardware, used)
    _draw_series(axes, mine, styles, scale=1.0)
    axes.set_title(f"{phase}, enlarged", fontweight="normal")
    axes.set_xlabel("FLOP per HBM byte")
    axes.set_ylabel("FLOP/s")
    log_ticks(axes.xaxis, axes.get_xlim(), most=4)
    log_ticks(axes.yaxis, axes.get_ylim(), most=6)


def _draw_series(
    axes: "Axes", series: Sequence[RooflineSeries], styles: SeriesStyle, scale: float
) -> None:
    for s in series:
        look = styles(s.name, s.level)
        path = [(p.intensity, p.predicted) for p in s.points if p.predicted is not None]
        if path:
            axes.plot(
                *zip(*path, strict=True),
                color=look["color"],
                linestyle=look["linestyle"] if s.is_path else "none",
                linewidth=0.9,
                marker=look["marker"],
                markersize=6.5 * scale,
                markerfacecolor="none",
                markeredgewidth=1.2 * scale,
                zorder=3,
                gid=f"predicted-{s.phase}",
                label=_series_label(s),
            )
        _draw_observed(axes, s, look, scale)


def _draw_observed(
    axes: "Axes", series: RooflineSeries, look: dict[str, Any], scale: float
) -> None:
    """Dots, the lines that join them to their rings, and ceilings: one line object each."""
    colour = look["color"]
    seen = [(p, p.observed) for p in series.points if p.observed is not None]
    if seen:
        axes.plot(
            [p.intensity for p, _ in seen],
            [observed for _, observed in seen],
            linestyle="none",
            marker=look["marker"],
            markersize=4.2 * scale,
            color=colour,
            zorder=4,
            gid=f"observed-{series.phase}",
        )
    joined = [
        (p.intensity, y)
        for p, observed in seen
        if p.predicted is not None
        for y in (p.predicted, observed, _GAP)
    ]
    if joined:
        xs, ys = zip(*joined, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1.0, zorder=2.5, gid="join")
    bars = [
        (p.intensity * stretch, p.ceiling if stretch else _GAP)
        for p in series.points
        if p.ceiling is not None
        for stretch in (1 / 1.15, 1.15, 0.0)
    ]
    if bars:
        xs, ys = zip(*bars, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=2.0, zorder=2, gid="ceiling")


def _series_label(s: RooflineSeries) -> str:
    return f"{s.name} ({s.level})" if s.level else s.name


def _legend_handles(axes: "Axes", series: Sequence[RooflineSeries]) -> list[Any]:
    points = [p for s in series for p in s.points]
    keys: list[Any] = []
    if any(p.predicted for p in points):
        keys.append(ring())
    if any(p.observed for p in points):
        keys.append(dot())
    if any(p.ceiling for p in points):
        keys.append(bar("bar: link or launches allow"))
    return [*handles_of([axes]).values(), *keys]


def _label_whole(
    axes: "Axes", series: Sequence[RooflineSeries], hardware: HardwareProfile, used: set[str]
) -> None:
    """Name the roofs and the two clouds of points."""
    peaks = [p for d, p in hardware.peak_flops_per_s.items() if d in used]
    peak = max(peaks or hardware.peak_flops_per_s.values())
    decode = [p.intensity for s in series if s.phase == "decode" for p in s.points]
    ridge = peak / hardware.hbm_bytes_per_s
    label_bandwidth(axes, hardware, max(decode, default=0.0) * 2, ridge)
    placer = Placer(axes, _anchors(series))
    for phase in ("decode", "prefill"):
        points = [p for s in series if s.phase == phase for p in s.points]
        points.sort(key=lambda p: min(_heights([p])))
        anchors = [(p.intensity, min(_heights([p]))) for p in points]
        placer.place(anchors, phase, fontweight="bold")
    label_roofs(axes, placer, hardware, used)


def _anchors(series: Sequence[RooflineSeries]) -> list[tuple[float, float]]:
    return [(p.intensity, y) for s in series for p in s.points for y in _heights([p])]


def _label_contexts(axes: "Axes", series: Sequence[RooflineSeries]) -> None:
    """Contexts at the ends of the paths, the longest first, where there is room."""
    placer = Placer(axes, _anchors(series))
    placed: list[tuple[str, float, float]] = []
    for end in (-1, 0):
        for s in series:
            p = s.points[end]
            text, anchor = tokens(p.context_tokens), (p.intensity, _heights([p])[0])
            x, y = axes.transAxes.inverted().transform(axes.transData.transform(anchor))
            # One label is enough for points that lie together.
            if any(t == text and math.hypot(x - u, y - v) < 0.2 for t, u, v in placed):
                continue
            if placer.place([anchor], text, color=GREY, fontsize=7.5) is not None:
                placed.append((text, x, y))
