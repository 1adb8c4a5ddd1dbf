"""Measures points, each in a process of its own, and writes one record for each as it finishes.

    for every point not finished yet:
        predict it (a function given by the caller) -> too large for this machine: a row says so
        run it in a fresh process                   -> ok, noisy, oom, crashed, timeout, error
        noisy: run it again, keep the steadier one
        append the record and sync

The parent never touches torch and only waits, so it does not disturb what it measures. Where
starting up costs more than a point (weights of many gigabytes), points of one model may share a
process: the first that fails ends it, and the next point gets a new one.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self

from costmodel.errors import LccostError
from costmodel.executors import Task, open_executor
from measure.environment import fingerprint, worker_variables
from measure.isolation import Outcome, Worker
from measure.memory_check import SKIPPED, host_check, needed_bytes
from measure.observation_options import How
from measure.points import MeasurePoint, record_key
from measure.progress import Report, progress
from measure.record_figures import describe, result_line, shares_of_peak, whole_model, widest_spread
from measure.store import RecordStore

SCHEMA_VERSION = "1"
#: Metrics that every record has, null where unknown.
_METRICS = (
    *("weights_bytes", "state_bytes", "state_host_bytes", "state_allocated_bytes"),
    *("peak_prefill_bytes", "peak_decode_bytes"),
    *("executed_prefill_flops", "executed_decode_flops", "ttft_s", "tpot_s", "tokens_per_s"),
    *("energy_j_per_token", "is_valid", "samples", "statistics", "quality"),
)

#: Key fields of a record -> the prediction of the same point (keys of ``predict``).
Predict = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is predicted of a point: its row, or None and a note of why; the memory one device
    needs, which may be known without a row.
    """

    row: dict[str, Any] | None = None
    note: str = ""
    needed_bytes: float | None = None


PredictionOf = Callable[[MeasurePoint], Prediction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a sweep goes about its points.

    timeout_s   seconds a point may take
    force       also start points that are predicted not to fit, and were skipped for it before
    retries     how often a noisy point is run again; the steadier run stands
    isolation   "point": every point in a process of its own; "model": points of one model share
                one until a point crashes, hangs or runs out of memory
    how         budgets and limits of the observation itself
    """

    timeout_s: float = 600.0
    force: bool = False
    retries: int = 0
    isolation: Literal["point", "model"] = "point"
    how: How = field(default_factory=How)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A combination that does not exist: its key fields, and why."""

    fields: Mapping[str, Any]
    reason: str

    def record(self) -> dict[str, Any]:
        """A row of nulls that says so; the same on every machine."""
        return {
            "schema_version": SCHEMA_VERSION,
            "record_key": record_key(self.fields),
            **self.fields,
            **dict.fromkeys(_METRICS),
            "status": "not_applicable",
            "applicable": False,
            "reason": self.reason,
            "message": self.reason,
            "environment": None,
            "predicted": None,
        }


def run_sweep(
    points: Iterable[MeasurePoint],
    *,
    output: str | PathLike[str],
    predict_point: Predict | None = None,
    predict_memory: Predict | None = None,
    resume: bool = False,
    rules: Rules | None = None,
    refused: Iterable[Refusal] = (),
    executor: str = "local",
) -> list[dict[str, Any]]:
    """Measure all points into ``output``.

    Parameters
    ----------
    predict_point
        Gives each record its ``predicted``; an ``LccostError`` from it becomes a note.
    predict_memory
        Where there is no ``predict_point``: peaks of memory alone, which no profile is needed for,
        so that a point that cannot fit is not started.
    resume
        Keep the file and run only what is not finished in this environment; otherwise start over
        (the old records stay beside it, with ``.bak`` behind the name).
    refused
        Combinations that do not exist; each becomes a row that says why.
    executor
        ``local``: one point after another on this machine. ``ray`` or ``ray://HOST:PORT``: on the
        nodes of a Ray cluster, every point with the processors and GPUs it needs to itself; a
        point finished on any node is then finished.

    Returns
    -------
    list
        The records of all points, in order: those written now and those found finished; then the
        rows of what was refused.
    """
    points, rules = list(points), rules or Rules()
    store = RecordStore(output, fresh=not resume, repeats={SKIPPED} if rules.force else ())

    def predicted(point: MeasurePoint) -> Prediction:
        return predicted_of(point, predict_point, predict_memory)

    with progress("measure", len(points)) as report:
        if executor == "local":
            _here(points, store, predicted, rules, report)
        else:
            on_cluster(executor, points, store, predicted, rules, report)
    rows = [refusal.record() for refusal in refused]
    for row in rows:
        store.append(row, unless_finished=True)
    # The latest attempt of a point stands; lines of other programs are no attempts.
    records = {
        r["record_key"]: {"message": "", **r}
        for r in store.records()
        if "record_key" in r and "status" in r
    }
    return [records[p.record_key] for p in points] + rows


def _here(
    points: list[MeasurePoint],
    store: RecordStore,
    predicted: PredictionOf,
    rules: Rules,
    report: Report,
) -> None:
    """One point after another on this machine."""
    environments = {place(p): fingerprint(worker_variables(p.threads), p.device) for p in points}
    with Workers(rules) as workers:
        for point in points:
            environment = environments[place(point)]
            if point.record_key in store.finished_keys(environment["id"]):
                report(f"{describe(point)}: measured before")
                continue
            record = measure(
                point,
                predicted(point),
                rules,
                environment=environment,
                workers=workers,
            )
            store.append(record, unless_finished=True)
            report(f"{describe(point)}: {result_line(record)}")


def on_cluster(
    kind: str,
    points: list[MeasurePoint],
    store: RecordStore,
    predicted: PredictionOf,
    rules: Rules,
    report: Report,
) -> None:
    """Every point as a task of a cluster; records are written here, as they come."""
    finished = store.finished_keys()
    todo = [p for p in points if p.record_key not in finished]
    for point in points:
        if point.record_key in finished:
            report(f"{describe(point)}: measured before")
    if not todo:
        return

    def done(index: int, record: Mapping[str, Any]) -> None:
        store.append(record, unless_finished=True)
        report(f"{describe(todo[index])}: {result_line(record)}")

    tasks: list[Task] = [(measure, (p, predicted(p), rules)) for p in todo]
    gpus = max(p.tp if p.device != "cpu" else 0 for p in todo)
    cpus = max(p.threads * (p.tp if p.device == "cpu" else 1) for p in todo)
    cluster = open_executor(kind, (no_setup, ()), num_cpus=cpus, num_gpus=gpus)
    with cluster as opened:
        opened.run(tasks, lambda n: None, done)


def no_setup() -> None:
    """Processes of a cluster need nothing before their first point."""


def place(point: MeasurePoint) -> tuple[str, int]:
    """What of a point its environment depends on."""
    return point.device, point.threads


class Workers:
    """Gives points their processes, by the rules."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._worker: Worker | None = None
        self._owner: tuple[object, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end()

    def observe(self, point: MeasurePoint, how: How) -> Outcome:
        """Run the point in a process; the one of the last point where the rules allow it."""
        owner = (
            *(point.executed, point.dtype, point.device, point.engine, point.threads, point.tp),
            *(point.seed, point.weights),
        )
        worker = self._worker
        if worker is None or owner != self._owner or not worker.alive:
            self._end()
            self._owner = owner
            self._worker = worker = Worker(
                variables=worker_variables(point.threads),
                # a CUDA context reserves far more addresses than there is memory
                limit_memory=point.device == "cpu",
            )
        function = (
            "measure.observation:observe" if point.tp == 1 else "measure.parallel.ranks:observe"
        )
        outcome = worker.call(function, (point, how), timeout_s=self.rules.timeout_s)
        # a point that was refused leaves the process as it was; a capture that failed may not
        ended = outcome.value is None or outcome.value.get("graph_failed")
        if self.rules.isolation == "point" or ended:
            self._end()
        return outcome

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None


def measure(
    point: MeasurePoint,
    prediction: Prediction | None = None,
    rules: Rules | None = None,
    *,
    environment: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Measure one point in a fresh process; the record says how it went and never raises for it."""
    rules, prediction = rules or Rules(), prediction or Prediction()
    environment = environment or fingerprint(worker_variables(point.threads), point.device)
    if workers is not None:
        return _record(point, prediction, rules, environment, workers)
    with Workers(rules) as own:
        return _record(point, prediction, rules, environment, own)


def _record(
    point: MeasurePoint,
    prediction: Prediction,
    rules: Rules,
    environment: Mapping[str, Any],
    workers: Workers,
) -> dict[str, Any]:
    started = datetime.now(UTC)
    clock = time.monotonic()
    predicted, note = prediction.row, prediction.note
    check: dict[str, Any] = {"memory_check": None}
    if not rules.force and point.device == "cpu":
        check = host_check(prediction.needed_bytes, ranks=point.tp)
    observed, attempts = check, 0
    if "status" not in check:
        observed, attempts = _steadiest(point, workers, _how(rules, prediction))
        observed = {**check, **observed}
    if note and not observed.get("message"):
        observed = {**observed, "message": note}
    return {
        "schema_version": SCHEMA_VERSION,
        "record_key": point.record_key,
        **point.fields,
        **dict.fromkeys(_METRICS),
        "message": "",
        **observed,
        **shares_of_peak(observed, predicted),
        **whole_model(point, observed, predicted),
        "attempts": attempts,
        "isolation": rules.isolation,
        "environment": dict(environment),
        "started": started.isoformat(timespec="seconds"),
        "elapsed_s": round(time.monotonic() - clock, 3),
        "predicted": predicted,
    }


def _how(rules: Rules, prediction: Prediction) -> How:
    """The rules' limits with what is predicted of this point."""
    return replace(
        rules.how,
        needed_bytes=None if rules.force else prediction.needed_bytes,
        predicted_ttft_s=(prediction.row or {}).get("ttft_s"),
    )


def _steadiest(point: MeasurePoint, workers: Workers, how: How) -> tuple[dict[str, Any], int]:
    """Run the point, again while it is noisy; (the steadiest result, runs)."""
    best: dict[str, Any] = {}
    for attempt in range(1, workers.rules.retries + 2):
        observed = _as_row(workers.observe(point, how))
        if not best or widest_spread(observed) < widest_spread(best):
            best = observed
        if observed["status"] != "noisy":
            return (observed if observed["status"] == "ok" else best), attempt
    return best, workers.rules.retries + 1


def predicted_of(
    point: MeasurePoint, predict_point: Predict | None, predict_memory: Predict | None = None
) -> Prediction:
    """What is predicted of a point, or a note of why nothing is."""
    if predict_point is None:
        row = None
        if predict_memory is not None:
            with contextlib.suppress(LccostError):  # a profile would say why; nobody gave one
                row = predict_memory(point.fields)
        return Prediction(needed_bytes=needed_bytes(row, point.device))
    try:
        row = dict(predict_point(point.fields))
    except LccostError as error:
        return Prediction(note=f"no prediction: {error}")
    return Prediction(row=row, needed_bytes=needed_bytes(row, point.device))


def _as_row(outcome: Outcome) -> dict[str, Any]:
    if outcome.status == "ok":
        return dict(outcome.value)
    more = outcome.value if isinstance(outcome.value, dict) else {}
    return {"status": outcome.status, "message": outcome.message, **more}
