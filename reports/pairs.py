"""One point with its prediction, its observation or both, and the error between them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reports.labels import METRIC_TITLES
from reports.records import Row, rows_of

#: What the functions that draw and tabulate accept.
Points = Iterable["Pair | Row | Mapping[str, Any]"]
#: What is compared, in the order it is shown.
METRICS = tuple(METRIC_TITLES)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pair:
    """One point: its prediction, its observation, or both. ``key`` has the fields of the point."""

    key: Row
    predicted: Row | None = None
    observed: Row | None = None

    @property
    def basis(self) -> str:
        """Basis of the predicted numbers."""
        return "" if self.predicted is None else self.predicted.text("basis", "unknown")

    @property
    def is_noisy(self) -> bool:
        """Whether the measurement itself was unsteady."""
        observed = self.observed
        return observed is not None and (
            observed.status == "noisy" or observed.values.get("is_valid") is False
        )

    @property
    def anchors_itself(self) -> bool:
        """Whether the observation is one that the prediction was anchored by."""
        if self.predicted is None or self.observed is None:
            return False
        anchors = self.predicted.values.get("anchored_by")
        key = self.observed.values.get("record_key")
        return isinstance(anchors, list) and key is not None and key in anchors

    @property
    def not_numbers(self) -> frozenset[str]:
        """Metrics that are NaN or infinite on either side."""
        observed = frozenset() if self.observed is None else self.observed.not_numbers
        predicted = frozenset() if self.predicted is None else self.predicted.not_numbers
        names = {n.removeprefix("predicted.") for n in observed} | predicted
        return frozenset(names & set(METRICS))

    def value(self, metric: str, side: str = "predicted") -> float | None:
        """A metric of one side ("predicted" or "observed"); ``peak_bytes`` is the worse phase's."""
        row = self.predicted if side == "predicted" else self.observed
        if row is None:
            return None
        if metric == "peak_bytes":
            return max(self._peaks(row).values(), default=None)
        return row.number(metric)

    def worst_phase(self, side: str = "predicted") -> str:
        """Phase of the larger peak; "" where none is known."""
        row = self.predicted if side == "predicted" else self.observed
        peaks = {} if row is None else self._peaks(row)
        return max(peaks, key=lambda phase: peaks[phase]) if peaks else ""

    @staticmethod
    def _peaks(row: Row) -> dict[str, float]:
        known = {phase: row.number(f"peak_{phase}_bytes") for phase in ("prefill", "decode")}
        return {phase: value for phase, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MetricError:
    """One metric of one pair. ``error`` is a fraction."""

    pair: Pair
    metric: str
    predicted: float
    observed: float
    error: float


def as_pairs(points: Iterable[Pair | Row | Mapping[str, Any]]) -> tuple[Pair, ...]:
    """Pairs from whatever is at hand: pairs, rows, or the dicts that ``predict`` returns.

    A row with a status is a measurement with its own prediction, every other one a prediction;
    rows that do not apply are left out.
    """
    pairs = []
    for n, item in enumerate(points, start=1):
        if isinstance(item, Pair):
            pairs.append(item)
            continue
        row = item if isinstance(item, Row) else rows_of([item], f"row {n}")[0]
        if "status" in row.values:
            own = row.values.get("predicted")
            predicted = Row(own, row.origin) if own else None
            pairs.append(Pair(key=row, predicted=predicted, observed=row))
        elif row.values.get("applicable") is not False:
            pairs.append(Pair(key=row, predicted=row))
    return tuple(pairs)


def metric_errors(pair: Pair) -> tuple[MetricError, ...]:
    """Signed errors of a pair; a metric unknown on either side, or zero on both, has none."""
    found = []
    for metric in METRICS:
        predicted, observed = pair.value(metric, "predicted"), pair.value(metric, "observed")
        if predicted is None or observed is None or (predicted == 0 and observed == 0):
            continue
        # Predicting something where nothing was observed is an infinitely large error.
        error = (predicted - observed) / observed if observed else math.inf
        found.append(
            MetricError(
                pair=pair, metric=metric, predicted=predicted, observed=observed, error=error
            )
        )
    return tuple(found)
