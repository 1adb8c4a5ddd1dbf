"""Intervals around predictions, from rows that the fits had not seen.

A row's deviation log(observed / predicted) is divided by the scatter expected of it, which goes as
``UNEXPLAINED`` + the disagreement of the fits that predicted it, times a factor of its family:

    scatter = A_family (UNEXPLAINED + disagreement)

A_family is the size that ``COVERED_SHARE`` of |deviation| / (UNEXPLAINED + disagreement) stay below
in the family's rows, the row itself left out, drawn towards that of all families of the kind. The
shortest interval that holds that share of the scaled deviations of all families of a kind, with the
correction for a finite sample, is scaled back by each row's scatter.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodel.kernels.interval import UNEXPLAINED, Interval, disagreement

Floats = NDArray[np.float64]

#: Share of other rows that an interval aims at.
COVERED_SHARE = 0.82
#: Rows of a family's own that the other families of its kind count as.
SHRINKING_ROWS = 16.0
#: Least scatter believed.
LEAST_SCATTER = 0.01


def intervals_of(predicted: Sequence[Floats], observed: Sequence[Floats]) -> list[Interval]:
    """One interval per family of a kind.

    ``predicted`` holds predictions by fits without the row, one line per judging seed.
    """
    differ: list[Floats] = [np.asarray(disagreement(p)) for p in predicted]
    deviations = [
        np.log(o / p) / (UNEXPLAINED + d)
        for p, o, d in zip(predicted, observed, differ, strict=True)
    ]
    out = []
    for (low, high), d in zip(pooled(deviations), differ, strict=True):
        usual = float(np.median(d)) if d.size else 0.0
        scale = UNEXPLAINED + usual
        out.append(Interval(float(np.exp(low * scale)), float(np.exp(high * scale)), usual))
    return out


def pooled(deviations: Sequence[Floats], share: float = COVERED_SHARE) -> list[tuple[float, float]]:
    """(low, high) ends of the interval of further deviations of each family: as wide as its own are
    scattered, of one form for all. Columns are rows of a table, lines their several predictions.
    """
    sizes = [np.abs(d) for d in deviations]
    everyone = _size(np.concatenate(sizes, axis=1), share)
    scaled = []
    for d, size in zip(deviations, sizes, strict=True):
        others = [np.delete(size, i, axis=1) for i in range(size.shape[1])]
        scaled.append(d / np.array([_scatter(o, share, everyone) for o in others]))
    low, high = np.log(shortest(np.concatenate(scaled, axis=1), share))
    factors = [_scatter(size, share, everyone) for size in sizes]
    return [(float(low * f), float(high * f)) for f in factors]


def _scatter(sizes: Floats, share: float, everyone: float) -> float:
    """The size that a share of a family's deviations stay below, drawn to that of everyone's."""
    n = sizes.shape[1]
    if not n:
        return everyone
    own = np.log([_size(sizes, share), everyone])
    return float(np.exp(np.average(own, weights=[n, SHRINKING_ROWS])))


def _size(sizes: Floats, share: float) -> float:
    return max(float(np.quantile(sizes, share)), LEAST_SCATTER) if sizes.size else LEAST_SCATTER


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


def covered_percent(
    interval: Interval, predicted: Floats, observed: Floats
) -> tuple[float, Floats]:
    """(share of rows inside an interval, (high - low) / mid of each prediction), in percent."""
    low, high = interval.factors(disagreement(predicted))
    inside = (observed >= predicted * low) & (observed <= predicted * high)
    width = np.broadcast_to((high - low) * 100.0, predicted.shape)
    return float(inside.mean() * 100.0), width
