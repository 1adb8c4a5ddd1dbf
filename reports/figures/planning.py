"""Figures of a capacity plan, from the document that ``lccost plan`` writes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from costmodel.units import GIB, format_seconds
from reports.figures.legend import handles_of, legend_below
from reports.figures.pareto import frontier
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
from reports.labels import safe_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
#: Latencies of the rate curve, with what people read.
CURVES = {
    "ttft_p50_s": "TTFT P50 (with queue)",
    "ttft_p99_s": "TTFT P99 (with queue)",
    "tpot_p95_s": "TPOT P95",
    "itl_p95_s": "ITL P95",
    "e2e_p99_s": "E2E P99",
}
_MOST_BARS = 12


def curve_titles(limits: Sequence[Row]) -> dict[str, str]:
    """What the curve shows: always the same, and every percentile that has a limit."""
    more = {}
    for x in limits:
        queue = " (with queue)" if x["metric"] == "ttft" else ""
        more[str(x["key"])] = f"{str(x['metric']).upper()} P{x['percentile']:g}{queue}"
    return CURVES | more


def row_name(row: Row) -> str:
    """A plan in a few words."""
    split = "".join(f" {k}{row[k]}" for k in ("tp", "pp", "ep", "cp") if (row.get(k) or 1) > 1)
    return safe_text(f"{row['method_spec']} on {row['gpu']}{split}", 40)


def speed_points(rows: Sequence[Row]) -> list[tuple[float, float, Row]]:
    """(tokens/s of one user, tokens/s of one GPU, row): what people compare services by."""
    return [
        (1.0 / r["tpot_p50_s"], r["output_tokens_per_s"] / r["gpus"], r)
        for r in rows
        if r.get("tpot_p50_s") and r.get("output_tokens_per_s") and r.get("gpus")
    ]


def cost_points(rows: Sequence[Row]) -> list[tuple[float, float, Row]]:
    """(US$ per hour, points of accuracy given up, row), where both are known."""
    return [
        (r["usd_per_hour"], r["accuracy_drop_points"], r)
        for r in rows
        if r.get("usd_per_hour") is not None and r.get("accuracy_drop_points") is not None
    ]


def unknown_points(rows: Sequence[Row]) -> tuple[float, list[tuple[float, float, Row]]]:
    """(where the strip of unknown accuracy begins, what stands in it): unknown is not zero."""
    top = max([1.0, *(drop for _, drop, _ in cost_points(rows))]) * 1.25
    found: list[tuple[float, float, Row]] = []
    for r in rows:
        if r.get("usd_per_hour") is not None and r.get("accuracy_drop_points") is None:
            # Plans that cost the same stand above each other.
            same = sum(usd == r["usd_per_hour"] for usd, _, _ in found)
            found.append((r["usd_per_hour"], top * (1.08 + 0.06 * same), r))
    return top, found


def plan_speed(rows: Sequence[Row], *, size: tuple[float, float] = WIDE) -> "Figure":
    """Tokens/s per GPU against tokens/s per user; up and right is better."""
    points = speed_points(rows)
    with house_style():
        figure, axes = new_figure(size)
        if not points:
            say_empty(axes, "no plan holds: nothing to draw")
            return figure
        _scatter(axes, points)
        best = [(-x, -y) for x, y in frontier([(-x, -y) for x, y, _ in points])]
        axes.plot(*zip(*best, strict=True), color=GREY, lw=1.0, gid="frontier")
        axes.set_xlim(left=0.0)
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("tokens/s of one user (1 / TPOT P50)")
        axes.set_ylabel("output tokens/s of one GPU")
        title_of(axes, "Speed of a user against use of a GPU")
        legend_below(figure, handles_of([axes]).values())
        return figure


def plan_cost(rows: Sequence[Row], *, size: tuple[float, float] = WIDE) -> "Figure":
    """Cost against accuracy given up; plans without evidence stand in a strip on top."""
    priced = [r for r in rows if r.get("usd_per_hour") is not None]
    with house_style():
        figure, axes = new_figure(size)
        if not priced:
            say_empty(axes, "no plan with a price holds: nothing to draw")
            return figure
        points = cost_points(priced)
        top, unknown = unknown_points(priced)
        _scatter(axes, [*points, *unknown])
        edge = frontier([(x, y) for x, y, _ in points])
        if edge:
            axes.step(*zip(*edge, strict=True), where="post", color=GREY, lw=1.0, gid="frontier")
        if unknown:
            axes.axhline(top, color=GREY, linewidth=0.8, linestyle=":")
            axes.text(0.01, top * 1.04, "accuracy unknown", color=GREY, fontsize=7.5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_xlim(0.0, max(r["usd_per_hour"] for r in priced) * 1.15)
        axes.set_ylim(
            min([0.0, *(d for _, d, _ in points)]) - 0.08 * top,
            max([top * 1.1, *(y for _, y, _ in unknown)]) + 0.08 * top,
        )
        axes.set_xlabel("US$ per hour")
        axes.set_ylabel("accuracy given up (points)")
        title_of(axes, "Cost against accuracy")
        legend_below(figure, handles_of([axes]).values())
        return figure


def _scatter(axes: "Axes", points: Sequence[tuple[float, float, Row]]) -> None:
    styles = SeriesStyle()
    for x, y, row in points:
        name = row_name(row)
        style = styles(str(row["method_spec"]), str(row["gpu"]))
        axes.plot(
            [x], [y], linestyle="none", color=style["color"], marker=style["marker"],
            markerfacecolor="none", label=name,
        )  # fmt: skip


def plan_load(
    curve: Sequence[Row],
    limits: Sequence[Row],
    name: str,
    bound: float | None = None,
    *,
    axis: str = "requests per second",
    size: tuple[float, float] = WIDE,
) -> "Figure":
    """Latency percentiles of one plan against the rate, with its limits and its closed form."""
    with house_style():
        figure, axes = new_figure(size)
        if not curve:
            say_empty(axes, "no plan holds: nothing to draw")
            return figure
        styles = SeriesStyle()
        rates = [c["rate_per_s"] for c in curve]
        drawn: list[float] = []
        for key, title in curve_titles(limits).items():
            values = [float(c[key]) for c in curve if c.get(key) is not None]
            if len(values) < len(curve):
                continue
            colour = styles(title)["color"]
            axes.plot(rates, values, color=colour, marker="o", markersize=4.0, label=title)
            drawn += values
            for limit in limits:
                if limit["key"] == key:
                    axes.axhline(limit["limit_s"], color=colour, linestyle="--", linewidth=1.0)
                    drawn.append(limit["limit_s"])
        if bound is not None:
            axes.axvline(bound, color=GREY, linestyle=":", linewidth=1.2, label="closed form")
        axes.set_yscale("log")
        span = (min(drawn) / 1.5, max(drawn) * 1.5)
        axes.set_ylim(span)
        log_ticks(axes.yaxis, span, most=9)
        format_axis(axes.yaxis, format_seconds)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(axis)
        axes.set_ylabel("seconds (dashed: the limit)")
        title_of(axes, f"Latency against rate: {safe_text(name, 80)}")
        legend_below(figure, handles_of([axes]).values())
        return figure


def plan_memory(rows: Sequence[Row], *, size: tuple[float, float] = WIDE) -> "Figure":
    """Memory of one GPU: weights, the state pool (and how much of it is used), the rest."""
    shown = [r for r in rows if r.get("binding")][:_MOST_BARS]
    with house_style():
        figure, axes = new_figure(size)
        if not shown:
            say_empty(axes, "no plan holds: nothing to draw")
            return figure
        for n, row in enumerate(reversed(shown)):
            b = row["binding"]
            weights, pool = b["weights_bytes"] / GIB, b["kv_pool_bytes"] / GIB
            rest = max(0.0, b["usable_bytes"] / GIB - weights - pool)
            used = pool * (row.get("kv_occupancy") or 0.0)
            left = 0.0
            for width, colour, hatch, label in (
                (weights, "#0072B2", "", "weights"),
                (used, "#E69F00", "///", "state in use (mean)"),
                (pool - used, "#FFFFFF", "", "state pool, free"),
                (rest, "#CCCCCC", "...", "transients and engine"),
            ):
                axes.barh(n, width, left=left, color=colour, hatch=hatch, edgecolor=GREY,
                          linewidth=0.6, label=label if n == 0 else "_")  # fmt: skip
                left += width
        axes.set_yticks(range(len(shown)), [row_name(r) for r in reversed(shown)])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("GiB of one GPU, up to what may be used")
        title_of(axes, "Where the memory goes")
        legend_below(figure, axes.get_legend_handles_labels()[0])
        return figure
