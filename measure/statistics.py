"""What repeated timings say: median, spread, confidence, validity. No assumption of normality.

The interval of the median comes from order statistics: the number of samples below the median is
binomial(n, 1/2), so two ranks bracket it with at least the wanted confidence whatever the
distribution (below 6 samples no two ranks reach 95 %; then the range itself is given).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: IQR / median above these: a measurement is called noisy, or not used at all (the thresholds of
#: torch.utils.benchmark).
NOISY_FRACTION, INVALID_FRACTION = 0.10, 0.25
#: Timings that are the metrics of a record; what is timed beside them only warns.
JUDGED = ("ttft_s", "tpot_s")
#: A first timed sample above this many medians says that warm-up was too short.
SLOW_FIRST_FACTOR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Summary of timed samples; all ``_s`` in seconds.

    mad_s             median absolute deviation from the median
    ci_low_s, ci_high_s   95 % interval of the median
    mild_outliers, severe_outliers   samples beyond 1.5 and 3 IQR outside the quartiles (Tukey)
    iqr_fraction      IQR / median
    drift_fraction    change of a straight line through the samples from first to last, over the
                      median: warming up, throttling, or a neighbour that came or went
    """

    n: int
    min_s: float
    p05_s: float
    p25_s: float
    median_s: float
    p75_s: float
    p95_s: float
    mean_s: float
    mad_s: float
    ci_low_s: float
    ci_high_s: float
    mild_outliers: int
    severe_outliers: int
    iqr_fraction: float
    drift_fraction: float

    @property
    def half_width_fraction(self) -> float:
        """Half the confidence interval over the median: what sampling goes on to reduce."""
        return (self.ci_high_s - self.ci_low_s) / 2 / self.median_s if self.median_s else 0.0


def summarise(samples: Sequence[float]) -> Statistics:
    """Summarise at least one sample."""
    x = np.sort(np.asarray(samples, dtype=np.float64))
    p05, p25, median, p75, p95 = (float(v) for v in np.percentile(x, (5, 25, 50, 75, 95)))
    iqr = p75 - p25
    low, high = median_interval(len(x))
    beyond = np.maximum(p25 - x, x - p75)
    return Statistics(
        n=len(x),
        min_s=float(x[0]),
        p05_s=p05,
        p25_s=p25,
        median_s=median,
        p75_s=p75,
        p95_s=p95,
        mean_s=float(x.mean()),
        mad_s=float(np.median(np.abs(x - median))),
        ci_low_s=float(x[low]),
        ci_high_s=float(x[high]),
        mild_outliers=int(np.sum((beyond > 1.5 * iqr) & (beyond <= 3 * iqr) & (beyond > 0))),
        severe_outliers=int(np.sum((beyond > 3 * iqr) & (beyond > 0))),
        iqr_fraction=iqr / median if median else 0.0,
        drift_fraction=_drift(samples, median),
    )


def median_interval(n: int, confidence: float = 0.95) -> tuple[int, int]:
    """0-based ranks of the sorted samples that bracket the median with ``confidence``.

    The narrowest symmetric pair (k, n - 1 - k) with P(k < Binomial(n, 1/2) < n - k) at least the
    confidence; (0, n - 1) where none is.
    """
    tail, best = 0.0, 0
    for k in range((n + 1) // 2):
        tail += math.comb(n, k) / 2.0**n  # P(Binomial <= k)
        if 1.0 - 2.0 * tail < confidence:
            break
        best = k
    return best, n - 1 - best


def warnings_of(statistics: Statistics, samples: Sequence[float]) -> tuple[str, ...]:
    """Say in words what makes the samples doubtful; nothing for steady ones."""
    found = []
    if statistics.iqr_fraction > NOISY_FRACTION:
        found.append(f"spread: IQR is {statistics.iqr_fraction:.0%} of the median")
    if samples and samples[0] > SLOW_FIRST_FACTOR * statistics.median_s:
        found.append("the first timed sample is over twice the median: warm-up was too short")
    return tuple(found)


def _drift(samples: Sequence[float], median: float) -> float:
    n = len(samples)
    if n < 3 or not median:
        return 0.0
    index = np.arange(n) - (n - 1) / 2
    slope = float(np.dot(index, np.asarray(samples)) / np.dot(index, index))
    return slope * (n - 1) / median
