"""Predicted beside observed: joins, signed errors, groups.

Error = (predicted - observed) / observed: positive where lccost promised too much time or memory.
Predictions of different basis (datasheet, prior, calibrated, ...) are never averaged together: each
group has one basis and names it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import ConfigError, LccostError, UnknownNameError
from reports.labels import point, safe_text, varying_fields
from reports.matching import PredictionIndex, hashable
from reports.pairs import METRICS as METRICS
from reports.pairs import MetricError as MetricError
from reports.pairs import Pair as Pair
from reports.pairs import Points as Points
from reports.pairs import as_pairs as as_pairs
from reports.pairs import metric_errors as metric_errors
from reports.records import KEY_FIELDS, Records, Row

#: Statuses whose numbers count. "noisy" counts and is shown.
USABLE = ("ok", "noisy")
#: Fields by which errors can be grouped.
GROUP_FIELDS = (
    *(k for k in KEY_FIELDS if k != "method_parameters"),
    *("layers", "device", "realisation", "status"),
)
_ALIASES = {"context": "context_tokens", "output": "output_tokens", "hardware": "gpu"}
_ANCHOR = "the prediction is anchored by this very point: its error says nothing"
_NOTHING_SHARED = "prediction and record share no known metric"
_LEFT_OUT_FIELDS = ("method_spec", "level", "context_tokens", "batch", "model")

Predict = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unjoined:
    """A record that takes no part in the errors, and why."""

    origin: str
    label: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Comparison:
    """All pairs (drawable, joined or not), the errors of the joined ones, and what is missing."""

    pairs: tuple[Pair, ...] = ()
    errors: tuple[MetricError, ...] = ()
    unjoined: tuple[Unjoined, ...] = ()
    notes: tuple[str, ...] = ()

    def past_tolerance(self, max_error: float) -> tuple[MetricError, ...]:
        """Errors whose size is above ``max_error`` (a fraction), the worst first."""
        past = [e for e in self.errors if abs(e.error) > max_error]
        return tuple(sorted(past, key=lambda e: -abs(e.error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Error of one metric in one group, in percent; one basis only.

    mape     mean size of the error          median, p90   of its size
    bias     median signed error             worst         the largest one, signed, with its point
    """

    group: Mapping[str, Any] = field(default_factory=dict)
    metric: str = ""
    basis: str = ""
    n: int = 0
    n_noisy: int = 0
    mape_percent: float = 0.0
    median_percent: float = 0.0
    p90_percent: float = 0.0
    bias_percent: float = 0.0
    worst_percent: float = 0.0
    worst_point: str = ""
    worst_origin: str = ""


def compare(records: Records, predict: Predict | None = None) -> Comparison:
    """Join measurements with predictions of the same point.

    Parameters
    ----------
    records
        What :func:`reports.records.read_records` returned.
    predict
        Called with a measurement that has no prediction of its own and none in the files; returns
        result keys of ``predict``; an ``LccostError`` becomes the reason why it was not joined.

    Returns
    -------
    Comparison
        A file's prediction replaces a record's own of the same basis; of another basis it stands
        beside it. Predictions that nothing observed stay as pairs to draw.
    """
    index = PredictionIndex(records.predictions)
    pairs: list[Pair] = []
    unjoined: list[Unjoined] = []
    for record in records.measurements:
        if record.status not in USABLE:
            reason = f"status {record.status}"
            message = safe_text(record.text("message"), 160)
            unjoined.append(_left_out(record, f"{reason}: {message}" if message else reason))
            own = record.values.get("predicted")
            if own and own.get("applicable") is not False:
                # What did not run was predicted all the same: it stays to be drawn.
                pairs.append(Pair(key=record, predicted=Row(own, f"{record.origin} predicted")))
            continue
        predictions, reason = _predictions_for(record, index, predict)
        if not predictions:
            unjoined.append(_left_out(record, reason))
            pairs.append(Pair(key=record, observed=record))
        pairs += [Pair(key=record, predicted=p, observed=record) for p in predictions]
    pairs += [
        Pair(key=row, predicted=row)
        for row in index.unused()
        if row.values.get("applicable") is not False
    ]
    errors = [e for pair in pairs if not pair.anchors_itself for e in metric_errors(pair)]
    joined = {id(e.pair) for e in errors}
    unjoined += [
        _left_out(p.key, _ANCHOR if p.anchors_itself else _NOTHING_SHARED)
        for p in pairs
        if p.predicted is not None and p.observed is not None and id(p) not in joined
    ]
    return Comparison(
        pairs=tuple(pairs),
        errors=tuple(errors),
        unjoined=tuple(unjoined),
        notes=(*records.notes, *_unknown_times(pairs)),
    )


def _unknown_times(pairs: Sequence[Pair]) -> Iterator[str]:
    """Times that were predicted and that records which ran do not know."""
    both = [p for p in pairs if p.predicted is not None and p.observed is not None]
    for metric in ("ttft_s", "tpot_s"):
        expected = [p for p in both if p.value(metric, "predicted") is not None]
        lacking = [p for p in expected if p.value(metric, "observed") is None]
        if lacking:
            yield f"{metric} is unknown in {len(lacking)} of {len(expected)} records compared"


def parse_fields(by: str | Sequence[str]) -> tuple[str, ...]:
    """Group fields from "method,context" or a sequence; raises ``UnknownNameError``, and
    ``ConfigError`` for a text without any.
    """
    names = by.split(",") if isinstance(by, str) else list(by)
    fields = []
    for name in (n.strip() for n in names):
        if not name:
            continue
        full = _ALIASES.get(name, name)
        if full not in GROUP_FIELDS:
            raise UnknownNameError("field to group by", name, [*GROUP_FIELDS, *_ALIASES])
        fields.append(full)
    if isinstance(by, str) and not fields:
        raise ConfigError("fields to group by: expected at least one, such as method, got none")
    return tuple(dict.fromkeys(fields))


def error_groups(
    comparison: Comparison, by: str | Sequence[str] = ("method",)
) -> tuple[ErrorGroup, ...]:
    """Errors by group, metric and basis; groups in order of first appearance."""
    fields = parse_fields(by)
    buckets: dict[tuple[Any, ...], list[MetricError]] = defaultdict(list)
    for error in comparison.errors:
        values = tuple(hashable(error.pair.key.values.get(f)) for f in fields)
        buckets[(*values, error.pair.basis, error.metric)].append(error)
    order = {values: n for n, values in enumerate(dict.fromkeys(key[:-1] for key in buckets))}
    varying = varying_fields([e.pair.key for e in comparison.errors])
    said = [
        f for f in varying if f not in fields and not (f == "method" and "method_spec" in fields)
    ]
    keys = sorted(buckets, key=lambda k: (order[k[:-1]], METRICS.index(k[-1])))
    return tuple(_group(dict(zip(fields, key, strict=False)), buckets[key], said) for key in keys)


def _group(group: dict[str, Any], errors: list[MetricError], said: Sequence[str]) -> ErrorGroup:
    signed = np.array([e.error for e in errors]) * 100.0
    size = np.abs(signed)
    worst = errors[int(np.argmax(size))]
    return ErrorGroup(
        group=group,
        metric=errors[0].metric,
        basis=errors[0].pair.basis,
        n=len(errors),
        n_noisy=sum(e.pair.is_noisy for e in errors),
        mape_percent=float(np.mean(size)),
        median_percent=_percentile(size, 50),
        p90_percent=_percentile(size, 90),
        bias_percent=_percentile(signed, 50),
        worst_percent=worst.error * 100.0,
        worst_point=point(worst.pair.key, said),
        worst_origin=worst.pair.key.origin,
    )


def _percentile(values: NDArray[np.float64], q: float) -> float:
    """Interpolated between neighbours, except where one is infinite: then the upper one."""
    method: Literal["linear", "higher"] = "linear" if np.all(np.isfinite(values)) else "higher"
    return float(np.percentile(values, q, method=method))


def _left_out(record: Row, reason: str) -> Unjoined:
    return Unjoined(origin=record.origin, label=point(record, _LEFT_OUT_FIELDS), reason=reason)


def _predictions_for(
    record: Row, index: PredictionIndex, predict: Predict | None
) -> tuple[list[Row], str]:
    """Predictions of one record, one a basis, and the reason where there is none."""
    by_basis: dict[str, Row] = {}
    own = record.values.get("predicted")
    if own:
        row = Row(own, f"{record.origin} predicted")
        by_basis[row.text("basis", "unknown")] = row
    for row in index.matching(record):
        by_basis[row.text("basis", "unknown")] = row
    if not by_basis and predict is not None:
        try:
            row = Row(predict(record.values), f"computed for {record.origin}")
        except LccostError as error:
            # One record that cannot be predicted must not hide the errors of the others.
            return [], f"no prediction could be computed: {safe_text(str(error), 160)}"
        by_basis[row.text("basis", "unknown")] = row
    if by_basis:
        refused = [r for r in by_basis.values() if r.values.get("applicable") is False]
        usable = [r for r in by_basis.values() if r.values.get("applicable") is not False]
        reason = f"predicted as not applicable: {refused[0].text('reason')}" if refused else ""
        return usable, reason
    return [], index.explain(record)
