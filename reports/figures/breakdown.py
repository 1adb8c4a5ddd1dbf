"""Where a pass spends its time: a waterfall of operations, coloured by what bounds each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from costmodel.hardware import HardwareProfile
from costmodel.units import format_seconds
from reports.figures.legend import legend_below
from reports.figures.style import (
    GREY,
    WIDE,
    format_axis,
    house_style,
    new_figure,
    say_empty,
    title_of,
)
from reports.labels import safe_text, tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What bounds an operation -> colour, hatch.
BOUNDS = {
    "compute": ("#D55E00", ""),
    "weight": ("#0072B2", "///"),
    "kv": ("#E69F00", "..."),
    "launch": ("#999999", "xxx"),
    "link": ("#CC79A7", "\\\\\\"),
}
_MOST_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation of a pass: seconds over all its runs, and what bounds it."""

    name: str
    seconds: float
    bound: str


def steps_of(
    operations: Sequence[Mapping[str, Any]], phase: str, hardware: HardwareProfile
) -> tuple[Step, ...]:
    """Operations of a phase, as ``predict --explain`` lists them, summed by name and bound.

    Beyond the largest ones the rest is one step, so that the waterfall still adds up.
    """
    sums: dict[tuple[str, str], float] = {}
    for op in operations:
        seconds = op.get("time_s")
        if op.get("phase") != phase or not isinstance(seconds, (int, float)) or seconds <= 0:
            continue
        key = (safe_text(str(op.get("name", "?")), 36), operation_bound(op, hardware))
        sums[key] = sums.get(key, 0.0) + float(seconds)
    largest = set(sorted(sums, key=lambda k: -sums[k])[:_MOST_STEPS])
    steps = [Step(name=k[0], seconds=v, bound=k[1]) for k, v in sums.items() if k in largest]
    rest = sum(v for k, v in sums.items() if k not in largest)
    if rest > 0:
        count = len(sums) - len(largest)
        steps.append(Step(name=f"{count} smaller ones", seconds=rest, bound="launch"))
    return tuple(steps)


def operation_bound(op: Mapping[str, Any], hardware: HardwareProfile) -> str:
    """The largest of an operation's datasheet times; "launch" where all explain under a third."""
    if op.get("bound") in BOUNDS:
        return str(op["bound"])
    count = _number(op, "count") or 1.0
    peak = hardware.peak_flops_per_s.get(str(op.get("dtype")))
    flops = _number(op, "executed_flops") or _number(op, "flops")
    bandwidth = hardware.hbm_bytes_per_s
    parts = {
        "compute": flops / peak if peak else 0.0,
        "weight": _number(op, "weight_bytes") / bandwidth,
        "kv": (_number(op, "state_bytes") + _number(op, "workspace_bytes")) / bandwidth,
        "link": _number(op, "link_bytes") / (hardware.host_link_bytes_per_s or float("inf")),
    }
    bound = max(parts, key=lambda k: parts[k])
    # Between kernels only activations move: no weights, no cache; what is left is the launch.
    return bound if parts[bound] * count > _number(op, "time_s") / 3 else "launch"


def breakdown(
    explanation: Mapping[str, Any],
    hardware: HardwareProfile,
    phase: str = "decode",
    *,
    size: tuple[float, float] = WIDE,
) -> "Figure":
    """A waterfall of one pass; ``explanation`` is one entry of ``predict --explain``'s list."""
    operations = explanation.get("operations")
    steps = steps_of(operations if isinstance(operations, list) else [], phase, hardware)
    with house_style():
        figure, axes = new_figure(size)
        if not steps:
            say_empty(axes, f"no operation of {phase} has a time: nothing to draw")
            return figure
        from matplotlib.patches import Patch

        start = 0.0
        total = sum(s.seconds for s in steps)
        for y, step in enumerate(steps):
            colour, hatch = BOUNDS[step.bound]
            axes.barh(
                y,
                step.seconds,
                left=start,
                height=0.7,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                gid="step",
            )
            axes.annotate(
                f"{format_seconds(step.seconds)}, {step.seconds / total:.0%}",
                (start + step.seconds, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=GREY,
                fontsize=7.5,
            )
            start += step.seconds
        axes.set_yticks(range(len(steps)), [s.name for s in steps])
        axes.invert_yaxis()
        axes.set_xlim(0, total * 1.16)
        axes.grid(axis="y", visible=False)
        format_axis(axes.xaxis, format_seconds)
        axes.set_xlabel("time (s), operations one after the other")
        title_of(axes, _title(explanation, phase, total))
        legend_below(
            figure,
            [
                Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=f"{bound}-bound")
                for bound, (colour, hatch) in BOUNDS.items()
                if any(s.bound == bound for s in steps)
            ],
        )
        return figure


def _title(explanation: Mapping[str, Any], phase: str, total: float) -> str:
    spec = safe_text(str(explanation.get("method_spec", "?")), 40)
    context = explanation.get("context_tokens")
    where = f", context {tokens(float(context))}" if isinstance(context, (int, float)) else ""
    pass_name = "decode step" if phase == "decode" else "prefill"
    return f"One {pass_name} of {spec}{where}: {format_seconds(total)}"


def _number(op: Mapping[str, Any], name: str) -> float:
    value = op.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
