"""Which figures a report has: those with something to draw, in the order of the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from costmodel.hardware import HardwareProfile
from reports import figures
from reports.axes import AXES
from reports.charts import CURVES
from reports.comparison import Pair
from reports.labels import safe_text
from reports.points import roofline_series
from reports.records import Row
from reports.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_DEVICES = 3
_MOST_EXPLANATIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Illustration:
    """A figure to be made by ``make(size=...)``; ``chart`` is the interactive twin's id, or ""."""

    section: str
    chart: str
    title: str
    make: "Callable[..., Figure]"


def illustrations(report: Report) -> tuple[Illustration, ...]:
    """All figures of a report."""
    pairs = report.pairs
    return (
        *_rooflines(report),
        *_errors(pairs),
        *_memory(report),
        *_curves(pairs),
        *_breakdowns(report),
    )


def has(pairs: Sequence[Pair], metric: str, side: str = "predicted") -> bool:
    """Whether any pair knows a metric above zero."""
    return any((p.value(metric, side) or 0.0) > 0 for p in pairs)


def has_one_context(pairs: Sequence[Pair]) -> bool:
    """Whether there is no curve to draw: methods stand side by side at their one context."""
    return len({p.key.number("context_tokens") for p in pairs}) == 1


def of_device(pairs: Sequence[Pair], hardware: HardwareProfile, only: bool) -> tuple[Pair, ...]:
    """Pairs on one device; all of them where the report knows no other device."""
    name = hardware.name.lower()
    mine = tuple(p for p in pairs if p.key.device.lower() == name)
    return tuple(pairs) if only and not mine else mine


def _rooflines(report: Report) -> list[Illustration]:
    made = []
    only = len(report.hardware) == 1
    for n, hardware in enumerate(report.hardware[:_MOST_DEVICES]):
        pairs = of_device(report.pairs, hardware, only)
        if not roofline_series(pairs, hardware):
            continue
        made.append(
            Illustration(
                section="roofline",
                chart=f"roofline-{n}",
                title=f"Roofline of {safe_text(hardware.title, 60)}",
                make=partial(figures.roofline, pairs, hardware),
            )
        )
    return made


def _errors(pairs: Sequence[Pair]) -> list[Illustration]:
    joined = [
        metric
        for metric in ("ttft_s", "tpot_s")
        if any(p.value(metric, "predicted") and p.value(metric, "observed") for p in pairs)
    ]
    if not joined:
        return []
    made = [
        Illustration(
            section="error",
            chart=f"scatter-{metric}",
            title=f"{AXES[metric].title}: predicted against observed",
            make=partial(figures.error_scatter, pairs, [metric]),
        )
        for metric in joined
    ]
    for field, words in (("context", "context"), ("method_spec", "method"), ("batch", "batch")):
        name = "context_tokens" if field == "context" else field
        if len({p.key.text(name) for p in pairs if p.observed is not None}) > 1:
            made.append(
                Illustration(
                    section="error",
                    chart="",
                    title=f"Error by {words}",
                    make=partial(figures.error_by, pairs, field, joined),
                )
            )
    return made


def _memory(report: Report) -> list[Illustration]:
    pairs = report.pairs
    made = []
    if has(pairs, "weights_bytes") or has(pairs, "weights_bytes", "observed"):
        hardware = report.hardware[0] if len(report.hardware) == 1 else None
        made.append(
            Illustration(
                section="memory",
                chart="",
                title="Where the memory goes",
                make=partial(figures.memory, pairs, hardware),
            )
        )
    known = has(pairs, "peak_bytes") or has(pairs, "peak_bytes", "observed")
    if known and not has_one_context(pairs):
        made.append(
            Illustration(
                section="memory",
                chart="curve-peak_bytes",
                title="Peak memory against context",
                make=partial(figures.curve, pairs, "peak_bytes"),
            )
        )
    return made


def _curves(pairs: Sequence[Pair]) -> list[Illustration]:
    flat = has_one_context(pairs)
    made = [
        Illustration(
            section="curves",
            chart="" if flat else f"curve-{metric}",
            title=AXES[metric].title if flat else f"{AXES[metric].title} against context",
            make=partial(figures.side_by_side if flat else figures.curve, pairs, metric),
        )
        for metric in CURVES
        if has(pairs, metric) or has(pairs, metric, "observed")
    ]
    cost = "usd_per_million_output_tokens"
    if has(pairs, cost):
        made.append(
            Illustration(
                section="accuracy",
                chart="pareto",
                title="Cost against accuracy",
                make=partial(figures.pareto, pairs),
            )
        )
    return made


def _breakdowns(report: Report) -> list[Illustration]:
    by_name = {h.name: h for h in report.hardware}
    only = report.hardware[0] if len(report.hardware) == 1 else None
    made = []
    for explanation in report.explanations[:_MOST_EXPLANATIONS]:
        hardware = by_name.get(Row(explanation).device, only)
        if hardware is None or not explanation.get("operations"):
            continue
        spec = safe_text(str(explanation.get("method_spec", "?")), 40)
        made.append(
            Illustration(
                section="breakdown",
                chart="",
                title=f"One decode step of {spec}",
                make=partial(figures.breakdown, explanation, hardware),
            )
        )
    return made
