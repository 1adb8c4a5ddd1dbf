"""Measures points, each in a process of its own, and writes one record for each as it finishes.

    for every point not finished yet:
        predict it (a function given by the caller) -> too large for this machine: a row says so
        run it in a fresh process                   -> ok, noisy, oom, crashed, timeout, error
        append the record and sync

The parent never touches torch and only waits, so it does not disturb what it measures.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from os import PathLike
from typing import Any

from costmodel.errors import LccostError
from costmodel.units import format_seconds
from measure.environment import available_memory_bytes, fingerprint, worker_variables
from measure.isolation import Outcome, run_isolated
from measure.points import MeasurePoint
from measure.progress import progress
from measure.store import RecordStore
from measure.timing import Budget

SCHEMA_VERSION = "1"
#: A point predicted to need more than this share of the free memory is not started.
MEMORY_FRACTION = 0.9
#: Metrics that every record has, null where unknown.
_METRICS = (
    *("weights_bytes", "state_bytes", "state_host_bytes", "state_allocated_bytes"),
    *("peak_prefill_bytes", "peak_decode_bytes"),
    *("executed_prefill_flops", "executed_decode_flops", "ttft_s", "tpot_s"),
    *("energy_j_per_token", "is_valid", "samples", "statistics", "quality"),
)

#: Key fields of a record -> the prediction of the same point (keys of ``predict``).
Predict = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def run_sweep(
    points: Iterable[MeasurePoint],
    *,
    output: str | PathLike[str],
    predict_point: Predict | None = None,
    resume: bool = False,
    timeout_s: float = 600.0,
    budget: Budget | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Measure all points into ``output``.

    Parameters
    ----------
    predict_point
        Gives each record its ``predicted``; an ``LccostError`` from it becomes a note.
    resume
        Keep the file and run only what is not finished in this environment; otherwise start over.
    force
        Also start points that are predicted not to fit.

    Returns
    -------
    list
        The records of all points, in order: those written now and those found finished.
    """
    points = list(points)
    store = RecordStore(output, fresh=not resume)
    environments = {p.threads: fingerprint(worker_variables(p.threads)) for p in points}
    with progress("measure", len(points)) as report:
        for point in points:
            key, environment = point.record_key, environments[point.threads]
            if key in store.finished_keys(environment["id"]):
                report(f"{describe(point)}: measured before")
                continue
            record = measure(
                point,
                predict_point=predict_point,
                timeout_s=timeout_s,
                budget=budget,
                force=force,
                environment=environment,
            )
            store.append(record)
            report(f"{describe(point)}: {_result_line(record)}")
    # The latest attempt of a point stands.
    records = {r["record_key"]: r for r in store.records() if "record_key" in r}
    return [records[p.record_key] for p in points]


def measure(
    point: MeasurePoint,
    *,
    predict_point: Predict | None = None,
    timeout_s: float = 600.0,
    budget: Budget | None = None,
    force: bool = False,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure one point in a fresh process; the record says how it went and never raises for it."""
    started = datetime.now(UTC)
    clock = time.monotonic()
    predicted, note = _predicted(point, predict_point)
    observed = None if force else _does_not_fit(predicted)
    if observed is None:
        observed = _as_row(
            run_isolated(
                "measure.observation:observe",
                (point, budget),
                timeout_s=timeout_s,
                variables=worker_variables(point.threads),
            )
        )
    if note and not observed.get("message"):
        observed = {**observed, "message": note}
    return {
        "schema_version": SCHEMA_VERSION,
        "record_key": point.record_key,
        **point.fields,
        **dict.fromkeys(_METRICS),
        "message": "",
        **observed,
        "environment": dict(environment or fingerprint(worker_variables(point.threads))),
        "started": started.isoformat(timespec="seconds"),
        "elapsed_s": round(time.monotonic() - clock, 3),
        "predicted": predicted,
    }


def describe(point: MeasurePoint) -> str:
    """Name a point in a line of progress."""
    return (
        f"{point.architecture.name} {point.stack.spec} {point.dtype} batch {point.batch} "
        f"context {point.context_tokens}"
    )


def _predicted(
    point: MeasurePoint, predict_point: Predict | None
) -> tuple[dict[str, Any] | None, str]:
    if predict_point is None:
        return None, ""
    try:
        return dict(predict_point(point.fields)), ""
    except LccostError as error:
        return None, f"no prediction: {error}"


def _does_not_fit(predicted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Make a row for a point that needs more memory than there is, or None."""
    available = available_memory_bytes()
    if predicted is None or available is None:
        return None
    needed = max(predicted.get("peak_prefill_bytes") or 0, predicted.get("peak_decode_bytes") or 0)
    if needed <= MEMORY_FRACTION * available:
        return None
    return {
        "status": "skipped_oom_predicted",
        "message": f"needs {needed:.3g} bytes of {available:.3g} available; force runs it anyway",
    }


def _as_row(outcome: Outcome) -> dict[str, Any]:
    if outcome.status == "ok":
        return dict(outcome.value)
    return {"status": outcome.status, "message": outcome.message}


def _result_line(record: Mapping[str, Any]) -> str:
    if record["ttft_s"] is None:
        return f"{record['status']}: {record['message']}"
    line = f"TTFT {format_seconds(record['ttft_s'])}, TPOT {format_seconds(record['tpot_s'])}"
    warnings = (record.get("quality") or {}).get("warnings")
    return f"{line} ({'; '.join(warnings)})" if warnings else line
