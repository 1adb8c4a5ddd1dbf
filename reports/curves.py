"""Metrics against context as plain numbers, and where their curves cross (break-even)."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reports.axes import AXES
from reports.comparison import Pair
from reports.points import MOST_SERIES, Namer
from reports.records import Row

_PLACE = ("gpu", "batch", "output_tokens")
#: In logarithms of the ratio.
_LEAST_GAP = math.log(1.02)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CurvePoint:
    """One context: mid, interval and observations of a metric; None where unknown."""

    pair: Pair
    context_tokens: float
    predicted: float | None
    low: float | None
    high: float | None
    observed: float | None
    #: 95 % interval of the observed median; None where the record has none
    observed_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CurveSeries:
    """One method at one level: a metric as context grows.

    ``is_path`` as in :class:`reports.points.RooflineSeries`; only series of one ``place`` (device,
    batch, output) are set against each other.
    """

    name: str
    level: str
    points: tuple[CurvePoint, ...]
    is_path: bool = True
    place: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name with its level, as legends say it."""
        return f"{self.name} ({self.level})" if self.level else self.name

    @property
    def path(self) -> list[tuple[float, float]]:
        """(context, mid), one value a context, the first where there are several."""
        path: dict[float, float] = {}
        for p in self.points:
            if p.predicted is not None:
                path.setdefault(p.context_tokens, p.predicted)
        return sorted(path.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """From ``context_tokens`` on, ``better`` beats ``worse``; ``value`` is what both cost there."""

    better: str
    worse: str
    context_tokens: float
    value: float


def curve_series(
    pairs: Sequence[Pair], metric: str, most: int | None = MOST_SERIES
) -> tuple[CurveSeries, ...]:
    """Series in order of first appearance; points without the metric are left out.

    More than ``most`` series (None: any number) cannot be told apart: then all points of a method
    are one.
    """
    namer = Namer(pairs) if most is None else Namer.fitting(pairs, most)
    stem = metric.removesuffix("_s")
    grouped: dict[tuple[str, str], list[CurvePoint]] = defaultdict(list)
    for pair in pairs:
        context = pair.key.number("context_tokens")
        predicted, observed = pair.value(metric, "predicted"), pair.value(metric, "observed")
        if context is None or (predicted is None and observed is None):
            continue
        grouped[namer(pair), pair.key.text("level")].append(
            CurvePoint(
                pair=pair,
                context_tokens=context,
                predicted=predicted,
                low=pair.value(f"{stem}_low_s"),
                high=pair.value(f"{stem}_high_s"),
                observed=observed,
                observed_interval=_observed_interval(pair, metric),
            )
        )
    return tuple(
        CurveSeries(
            name=name,
            level=level,
            points=tuple(sorted(points, key=lambda p: p.context_tokens)),
            is_path=not namer.is_coarse,
            place=tuple(points[0].pair.key.text(f) for f in _PLACE),
        )
        for (name, level), points in grouped.items()
    )


def _observed_interval(pair: Pair, metric: str) -> tuple[float, float] | None:
    statistics = {} if pair.observed is None else pair.observed.values.get("statistics") or {}
    of_metric = statistics.get(metric)
    if not isinstance(of_metric, dict):
        return None
    low, high = (Row(of_metric).number(f"ci_{side}_s") for side in ("low", "high"))
    return None if low is None or high is None else (low, high)


def crossings(series: Sequence[CurveSeries], metric: str) -> tuple[Crossing, ...]:
    """Where one curve starts to beat another, by context, for every pair of predicted curves.

    Between two contexts both curves are taken as straight in log-log, as the figures draw them.
    Curves count as crossed when they lie at least 2 % apart on either side: less is a touch, and
    less than any prediction can tell. Levels are only mixed where one method is not there at the
    other's level.
    """
    lower_is_better = AXES[metric].lower_is_better
    there = {(s.name, s.level) for s in series}
    found = []
    for a, b in _comparable(series):
        if a.level != b.level and ((a.name, b.level) in there or (b.name, a.level) in there):
            continue
        first, second = dict(a.path), dict(b.path)
        shared = sorted(c for c in first.keys() & second.keys() if first[c] > 0 and second[c] > 0)
        for c0, c1, share, second_is_lower in _sign_changes(
            [(c, math.log(first[c] / second[c])) for c in shared]
        ):
            second_wins = second_is_lower == lower_is_better
            better, worse = (b.label, a.label) if second_wins else (a.label, b.label)
            found.append(
                Crossing(
                    better=better,
                    worse=worse,
                    context_tokens=_between(c0, c1, share),
                    value=_between(first[c0], first[c1], share),
                )
            )
    return tuple(sorted(found, key=lambda c: c.context_tokens))


def _comparable(series: Sequence[CurveSeries]) -> Iterator[tuple[CurveSeries, CurveSeries]]:
    """Pairs of curves of one place."""
    places: dict[tuple[str, ...], list[CurveSeries]] = defaultdict(list)
    for s in series:
        if s.is_path:
            places[s.place].append(s)
    for members in places.values():
        yield from itertools.combinations(members, 2)


def _sign_changes(gaps: list[tuple[float, float]]) -> Iterator[tuple[float, float, float, bool]]:
    """(context before, after, share of the way, whether the gap is then positive)."""
    clear = [n for n, (_, gap) in enumerate(gaps) if abs(gap) >= _LEAST_GAP]
    for i, j in itertools.pairwise(clear):
        before = gaps[i][1]
        if before * gaps[j][1] > 0:
            continue
        k = next(n for n in range(i + 1, j + 1) if gaps[n][1] * before < 0)
        (c0, gap0), (c1, gap1) = gaps[k - 1], gaps[k]
        yield c0, c1, gap0 / (gap0 - gap1), gap1 > 0


def _between(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))
