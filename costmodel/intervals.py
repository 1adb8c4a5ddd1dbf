"""How wide an interval is: by the mean size of errors on rows that no fit had seen.

    low, high = mid exp(-+ REACH scatter)      scatter = mean |log(observed / predicted)|

Four in five of a Laplace distribution of that mean size lie within ln 5 of it, and of a normal one
within 1.606. A mean is steadier than the quantiles of few rows, so an interval need not be wider
than its rows are off to hold what it says.

Errors differ by what is predicted, so a narrow group of rows (one GPU's of one class of metric) is
judged by its own errors as far as it has some: the group around it counts as ``WIDER_ROWS`` rows.
"""

import math

import numpy as np
from numpy.typing import NDArray

from costmodel.operation import Array

#: Mean errors from the middle to either end of an interval.
REACH = math.log(5.0)
#: Rows of a group's own that the errors of the group around it count as.
WIDER_ROWS = 4.0


def scatter_of(errors: NDArray[np.float64], wider: float) -> float:
    """Mean size of a group's errors (logarithms), of which the group around it has ``wider``.

    Columns are rows of the group, of which each line is one more prediction.
    """
    sizes = np.abs(np.atleast_2d(errors))
    n: int = sizes.shape[-1]
    own = float(sizes.mean()) if n else 0.0
    return (n * own + WIDER_ROWS * wider) / (n + WIDER_ROWS)


def factors(scatter: Array) -> tuple[Array, Array]:
    """(low, high) on the middle."""
    reach = REACH * np.asarray(scatter)
    return np.exp(-reach), np.exp(reach)
