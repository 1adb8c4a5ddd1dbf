"""Figures of a record that follow from what was observed and predicted; its line of progress."""

from collections.abc import Mapping
from typing import Any

from costmodel.units import format_seconds
from measure.points import MeasurePoint
from measure.statistics import JUDGED


def shares_of_peak(
    observed: Mapping[str, Any], predicted: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """MFU of prefill and MBU of decode: useful work over what the profile's peaks would do in the
    time measured. Null without a profile.
    """
    p, ttft, tpot = predicted or {}, observed.get("ttft_s"), observed.get("tpot_s")

    def share(amount: str, rate: str, seconds: float | None) -> float | None:
        if not (seconds and p.get(amount) and p.get(rate)):
            return None
        return float(p[amount]) / (float(p[rate]) * seconds)

    return {
        "mfu": share("prefill_flops", "peak_flops_per_s", ttft),
        "mbu": share("decode_hbm_bytes", "hbm_bytes_per_s", tpot),
    }


def whole_model(
    point: MeasurePoint, observed: Mapping[str, Any], predicted: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the whole model would show where only some layers ran: what was measured, times the
    prediction of the whole over that of the part. Always extrapolated, and says so.
    """
    if point.executed.n_layers == point.architecture.n_layers:
        return {"extrapolated": False, "whole_model": None}
    whole = (predicted or {}).get("whole_model") or {}
    found = {
        name: observed[name] * value / predicted[name]
        for name, value in whole.items()
        if predicted and predicted.get(name) and observed.get(name) and value is not None
    }
    return {"extrapolated": True, "whole_model": {**found, "extrapolated": True} if found else None}


def describe(point: MeasurePoint) -> str:
    """Name a point in a line of progress."""
    return (
        f"{point.architecture.name} {point.stack.spec} {point.dtype} batch {point.batch} "
        f"context {point.context_tokens}"
    )


def result_line(record: Mapping[str, Any]) -> str:
    """Say in one line how a point went."""
    if record["tpot_s"] is None:
        return f"{record['status']}: {record['message']}"
    ttft = record["ttft_s"]
    line = f"TTFT {'not run' if ttft is None else format_seconds(ttft)}, "
    line += f"TPOT {format_seconds(record['tpot_s'])}"
    warnings = (record.get("quality") or {}).get("warnings")
    return f"{line} ({'; '.join(warnings)})" if warnings else line


def widest_spread(observed: Mapping[str, Any]) -> float:
    """Widest relative spread of the times of a result's metrics; infinite without any."""
    timings = observed.get("statistics") or {}
    found = [s["iqr_fraction"] for name, s in timings.items() if name in JUDGED]
    return max(found, default=float("inf"))
