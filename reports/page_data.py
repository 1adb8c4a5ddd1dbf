"""The data block of the page: chart specifications by id, as ``illustrations`` names them."""

from typing import Any

from costmodel.hardware import HardwareProfile
from reports import charts
from reports.illustrations import has_one_context, of_device
from reports.ranking import rank
from reports.report import Report
from reports.roofline_chart import roofline_chart


def capacity_limit(device: HardwareProfile, memory_fraction: float) -> tuple[float, str]:
    """Bytes that may be used, and what the line is called."""
    return device.memory_bytes * memory_fraction, f"usable: {memory_fraction:.0%} of the device"


def chart_specs(report: Report, memory_fraction: float = 0.9) -> dict[str, Any]:
    """Every interactive chart that has data, by id."""
    pairs = report.pairs
    ranked = rank(pairs)
    colours = charts.Colours.by_rank([r.pair for r in ranked])
    rows = {id(r.pair): n for n, r in enumerate(ranked)}
    only = len(report.hardware) == 1
    device = report.hardware[0] if only else None
    specs: dict[str, Any] = {
        f"roofline-{n}": roofline_chart(of_device(pairs, hardware, only), hardware, rows, colours)
        for n, hardware in enumerate(report.hardware)
    }
    if not has_one_context(pairs):
        limit = capacity_limit(device, memory_fraction) if device is not None else None
        specs |= {f"curve-{m}": charts.curve_chart(pairs, m, rows, colours) for m in charts.CURVES}
        specs["curve-peak_bytes"] = charts.curve_chart(pairs, "peak_bytes", rows, colours, limit)
    for metric in ("ttft_s", "tpot_s"):
        specs[f"scatter-{metric}"] = charts.scatter_chart(pairs, metric, rows, colours)
    specs["pareto"] = charts.pareto_chart(pairs, rows, colours)
    return {name: spec for name, spec in specs.items() if spec is not None}
