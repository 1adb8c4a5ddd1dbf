"""Intervals around predictions, from rows that the fits had not seen.

A row's deviation log(observed / predicted) is divided by the scatter of rows like it, itself left
out: of its family, in classes of predicted time (launch-bound, middling and large calls scatter
differently), drawn towards the family's mean. The shortest interval that holds ``COVERED_SHARE`` of
the scaled deviations of all families of a kind, with the correction for a finite sample, is scaled
back by each class's scatter.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodel.kernels.families import Interval

Floats = NDArray[np.float64]

#: Share of other rows that an interval aims at.
COVERED_SHARE = 0.83
#: Rows a class of predicted time needs for a scatter of its own, and the most classes.
CLASS_ROWS = 10
MOST_CLASSES = 10
#: Rows by which a class's scatter is drawn to its family's, and the least scatter believed.
SHRINKING_ROWS = 8.0
LEAST_SCATTER = 0.01


def intervals_of(predicted: Sequence[Floats], observed: Sequence[Floats]) -> list[Interval]:
    """One interval per family of a kind.

    ``predicted`` holds predictions by fits without the row, one line per judging seed.
    """
    scatters = [_Scatter(p, o) for p, o in zip(predicted, observed, strict=True)]
    low, high = shortest(np.concatenate([s.scaled() for s in scatters], axis=1))
    return [
        Interval(
            tuple(s.edges.tolist()),
            tuple(np.exp(np.log(low) * s.of_class).tolist()),
            tuple(np.exp(np.log(high) * s.of_class).tolist()),
        )
        for s in scatters
    ]


class _Scatter:
    """Mean |log(observed / predicted)| of one family by class of predicted time."""

    def __init__(self, predicted: Floats, observed: Floats) -> None:
        self.deviation = np.log(observed / predicted)
        n_seeds, n_rows = predicted.shape
        n_classes = int(np.clip(n_rows // CLASS_ROWS, 1, MOST_CLASSES))
        self.edges = np.quantile(predicted, [i / n_classes for i in range(1, n_classes)])
        which = np.searchsorted(self.edges, predicted, side="right")
        self.member = which == np.arange(n_classes)[:, None, None]  # [class, seed, row]
        size = np.abs(self.deviation)
        self.by_row = (self.member * size).sum(axis=1)
        self.rows = self.member.sum(axis=1)
        self.weight = SHRINKING_ROWS * n_seeds  # every row counts once per judging seed
        self.of_class = self._drawn(self.by_row.sum(axis=1), self.rows.sum(axis=1))

    def _drawn(self, total: Floats, count: NDArray[np.int64]) -> Floats:
        """Scatter of every class, drawn to the mean of all; classes on the first axis."""
        mean = np.maximum(total.sum(axis=0) / np.maximum(count.sum(axis=0), 1), LEAST_SCATTER)
        scatter: Floats = (total + self.weight * mean) / (count + self.weight)
        return scatter

    def scaled(self) -> Floats:
        """Deviations over the scatter of their class without the row itself: [seed, row]."""
        total = self.by_row.sum(axis=1, keepdims=True) - self.by_row
        count = self.rows.sum(axis=1, keepdims=True) - self.rows
        scatter = self._drawn(total, count)  # [class, row]
        scaled: Floats = self.deviation / (self.member * scatter[:, None, :]).sum(axis=0)
        return scaled


def shortest(log_ratio: Floats, share: float = COVERED_SHARE) -> tuple[float, float]:
    """Factors of the shortest interval around 1 that holds a share of further ratios.

    Columns are rows of a table, lines their predictions by several fits. Of n columns the interval
    holds (n + 2) / n times the share: its two ends were chosen among them. NaN for none.
    """
    n_rows = log_ratio.shape[-1]
    if not n_rows:
        return float("nan"), float("nan")
    share = min(1.0, share * (n_rows + 2) / n_rows)
    ratios = np.sort(np.append(log_ratio.ravel(), 0.0))
    n_inside = min(max(int(np.ceil(share * ratios.size)), 2), ratios.size)
    widths = ratios[n_inside - 1 :] - ratios[: ratios.size - n_inside + 1]
    # Only intervals that hold the prediction itself.
    here = int(np.searchsorted(ratios, 0.0))
    starts = np.arange(widths.size)
    around = (starts <= here) & (starts + n_inside - 1 >= here)
    start = int(starts[around][np.argmin(widths[around])])
    return float(np.exp(ratios[start])), float(np.exp(ratios[start + n_inside - 1]))


def covered_percent(interval: Interval, predicted: Floats, observed: Floats) -> tuple[float, float]:
    """(share of rows inside an interval, median of (high - low) / mid), both in percent."""
    low, high = interval.factors(predicted)
    inside = (observed >= predicted * low) & (observed <= predicted * high)
    return float(inside.mean() * 100.0), float(np.median(np.asarray(high) - low) * 100.0)
