"""What a validation says: figures overall, by group, what could not be modelled, the worst rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Block:
    """Predictions of rows that share a group.

    group    hardware, framework, kernel, metric and whatever else tells groups of a kind apart
    rows     indices into the table's records
    low, mid, high   seconds, bytes or joules; low and high are NaN where there is no interval
    basis    where the numbers come from
    primary  counts in the overall figures of the kind
    unit     of low, mid, high
    parts    names of the parts of the table these rows belong to, judged apart
    limit    what no device could beat with the shape the row states; None: nothing is known
    """

    group: Mapping[str, str]
    rows: NDArray[np.intp]
    low: Floats
    mid: Floats
    high: Floats
    basis: str
    primary: bool = True
    unit: str = "s"
    parts: tuple[str, ...] = ()
    limit: Floats | None = None

    def where(self, mask: NDArray[np.bool_]) -> "Block":
        """The rows a mask selects."""
        return replace(
            self,
            rows=self.rows[mask],
            low=self.low[mask],
            mid=self.mid[mask],
            high=self.high[mask],
            limit=None if self.limit is None else self.limit[mask],
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Predictions:
    """A whole table predicted: blocks, and why the other rows are not (row, reason)."""

    blocks: tuple[Block, ...]
    unsupported: tuple[tuple[int, str], ...] = ()
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Errors of predictions in percent of what was observed; None where nothing was compared.

    coverage_percent        rows inside their interval
    interval_width_percent  median of (high - low) / mid
    """

    n: int
    mape_percent: float | None = None
    median_percent: float | None = None
    p90_percent: float | None = None
    bias_percent: float | None = None
    coverage_percent: float | None = None
    interval_width_percent: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Every figure under its name."""
        return {name: getattr(self, name) for name in self.__slots__}


def figures(low: Floats, mid: Floats, high: Floats, observed: Floats) -> Figures:
    """Compare predictions with what was observed; all arrays of one length.

    MAPE, median and 90th percentile of |predicted - observed| / observed; bias is the mean of the
    same with its sign.
    """
    n = int(mid.size)
    if n == 0:
        return Figures(n=0)
    relative = (mid / observed - 1.0) * 100.0
    size = np.abs(relative)
    known = np.isfinite(low) & np.isfinite(high)
    coverage = width = None
    if known.any():
        inside = (observed >= low) & (observed <= high)
        coverage = float(inside[known].mean() * 100.0)
        width = float(np.median((high - low)[known] / mid[known]) * 100.0)
    return Figures(
        n=n,
        mape_percent=float(size.mean()),
        median_percent=float(np.median(size)),
        p90_percent=float(np.percentile(size, 90)),
        bias_percent=float(relative.mean()),
        coverage_percent=coverage,
        interval_width_percent=width,
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Validation:
    """The outcome for one table; ``as_dict`` is the form of ``lccost validate --format json``."""

    kind: str
    baseline: str | None
    overall: Figures
    groups: tuple[tuple[Mapping[str, str], Figures, str], ...]
    unsupported: tuple[tuple[str, int], ...]
    worst: tuple[Mapping[str, Any], ...]
    parts: Mapping[str, Figures] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys of the interface and ``parts`` besides."""
        return {
            "kind": self.kind,
            "baseline": self.baseline,
            "overall": self.overall.as_dict(),
            "parts": {name: f.as_dict() for name, f in self.parts.items()},
            "groups": [
                {"group": dict(group), **f.as_dict(), "basis": basis}
                for group, f, basis in self.groups
            ],
            "unsupported": [{"reason": reason, "n": n} for reason, n in self.unsupported],
            "worst": [dict(row) for row in self.worst],
        }


def joined(blocks: Sequence[tuple[Floats, ...]]) -> tuple[Floats, ...]:
    """Columns of several blocks, one after the other."""
    if not blocks:
        empty = np.empty(0)
        return empty, empty, empty, empty
    return tuple(np.concatenate(column) for column in zip(*blocks, strict=True))
