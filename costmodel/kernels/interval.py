"""How wide an interval stands around the prediction of a fitted kernel family."""

import math
from dataclasses import dataclass, replace

import numpy as np

from costmodel.operation import Array

#: Disagreement at which a prediction scatters twice as much as one on which all fits agree: what
#: the form of a model does not explain is there however many rows are fitted.
UNEXPLAINED = 0.03


def disagreement(seconds: Array) -> Array:
    """How far fits to halves of the same rows differ: the standard deviation of the logarithm of
    their predictions, one fit per line. 0 of a single fit, and of calls that take no time.
    """
    some = np.asarray(seconds)
    logs = np.log(np.where(some > 0.0, some, 1.0))
    if len(logs) < 2:
        return np.zeros(logs.shape[1:])
    spread: Array = logs.std(axis=0, ddof=1)
    return spread


@dataclass(frozen=True, slots=True)
class Interval:
    """Factors on a prediction that held most unseen rows.

    Their logarithms go as ``UNEXPLAINED`` + the disagreement of fits to halves of the rows: where
    few rows say what a call takes, such fits differ, and predictions are further off.

    low, high   the factors at the ``usual`` disagreement of the family's rows
    spread      of the logarithm, independent of that: adds as squares
    """

    low: float
    high: float
    usual: float = 0.0
    spread: float = 0.0

    def factors(self, disagreement: Array | None = None) -> tuple[Array, Array]:
        """(low, high) for each disagreement; without any the usual one."""
        scale: Array = np.float64(1.0)
        if disagreement is not None:
            scale = (UNEXPLAINED + np.asarray(disagreement)) / (UNEXPLAINED + self.usual)
        below, above = math.log(self.low) * scale, math.log(self.high) * scale
        return np.exp(-np.hypot(below, self.spread)), np.exp(np.hypot(above, self.spread))

    def wider(self, spread: float) -> "Interval":
        """The same interval with a further independent ``spread`` of the logarithm."""
        return replace(self, spread=math.hypot(self.spread, spread))
