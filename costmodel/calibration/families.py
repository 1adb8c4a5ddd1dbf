"""Fit every family of a table, judge it on rows it has not seen, and write it down.

Judging: rows are split into seeded halves; each half is predicted by a fit of the other, for
``JUDGING_SEEDS`` splits. Those predictions give the error and the interval. The parameters
written are of a fit to all rows, which no reported error uses. Those of the first half of each
split are written beside them: how far they differ on a shape says how wide its interval is.

A family with few rows starts from what its kin taught: the pooled fit of all families of its
class of implementation and variant, with half the spread of the prior.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.calibration.fit import Floats, fit_parameters, halves, narrowed
from costmodel.calibration.intervals import covered_percent, intervals_of
from costmodel.calibration.tables import FamilyKey, Rows
from costmodel.errors import ConfigError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.kernels.families import GENERATION_SPREAD
from costmodel.kernels.interval import Interval
from costmodel.kernels.kinds import KernelKind, kernel_class, kernel_kind

#: Families below this many rows start from their kin.
FEW_ROWS = 24
#: Share of the prior's spread that is left after kin have taught.
KIN_SHARE = 0.5
#: A family below this many rows is not written: nothing could be held out.
LEAST_ROWS = 4
#: Seeded splits that judge a family: enough that the disagreement of their fits says something.
JUDGING_SEEDS = (0, 1, 2, 3, 4, 5)
#: Seeded splits that judge intervals.
INTERVAL_SEEDS = (101, 102, 103, 104)
Devices = Mapping[str, HardwareProfile]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """One family: parameters of all rows, and predictions of each row by fits without it.

    held_out_s has one row per judging seed, half_fits the parameters of one fit per judging seed.
    """

    key: FamilyKey
    parameters: Mapping[str, float]
    rows: Rows
    held_out_s: Floats
    roofline_s: Floats
    half_fits: Sequence[Mapping[str, float]] = ()


def fit_families(
    tables: Sequence[Rows],
    devices: Devices | None = None,
    *,
    seeds: Sequence[int] = JUDGING_SEEDS,
    starts: int = 3,
) -> list[Fitted]:
    """Fit and judge families of one kind. ``devices`` overrides profiles by hardware name."""
    kinds = {rows.key.kind for rows in tables}
    if len(kinds) != 1:
        raise ConfigError(f"expected families of one kind, got {', '.join(sorted(kinds))}")
    kind = kernel_kind(kinds.pop())
    fitter = _Fitter(kind, devices or {}, starts)
    final = fitter.fit(tables)
    held_out = [np.empty((len(seeds), len(rows))) for rows in tables]
    half_fits: list[list[dict[str, float]]] = [[] for _ in tables]
    for s, seed in enumerate(seeds):
        first = [half_of_shapes(rows, seed + 7 * i) for i, rows in enumerate(tables)]
        for masks in (first, [~mask for mask in first]):
            fitted = fitter.fit([r.where(m) for r, m in zip(tables, masks, strict=True)])
            for i, (rows, mask) in enumerate(zip(tables, masks, strict=True)):
                held_out[i][s, ~mask] = fitter.predict(rows.where(~mask), fitted[i])
                if masks is first:
                    half_fits[i].append(fitted[i])
    return [
        Fitted(
            rows.key,
            {**kind.structure(rows.key.kernel, rows.key.variant), **final[i]},
            rows,
            held_out[i],
            np.asarray(kind.roofline_s(fitter.device(rows), rows.shape, rows.key.variant)),
            half_fits[i],
        )
        for i, rows in enumerate(tables)
    ]


def half_of_shapes(rows: Rows, seed: int) -> NDArray[np.bool_]:
    """Pick a seeded half of the shapes: a call that was repeated stands on one side of it."""
    index = rows.shape_index()
    return halves(int(index.max(initial=-1)) + 1, seed)[index]


class _Fitter:
    """Fits of one kind, with the rule for families with few rows."""

    def __init__(self, kind: KernelKind, devices: Devices, starts: int) -> None:
        self.kind = kind
        self.devices = devices
        self.starts = starts

    def device(self, rows: Rows) -> HardwareProfile:
        name = rows.key.hardware
        return self.devices[name] if name in self.devices else load_hardware(name)

    def item(self, rows: Rows) -> tuple[Rows, HardwareProfile, Mapping[str, float]]:
        return rows, self.device(rows), self.kind.structure(rows.key.kernel, rows.key.variant)

    def predict(self, rows: Rows, values: Mapping[str, float]) -> Floats:
        _, device, structure = self.item(rows)
        parameters = self.kind.build({**structure, **values})
        seconds = self.kind.time_s(parameters, device, rows.shape, rows.key.variant, False)
        return np.asarray(seconds, dtype=np.float64)

    def fit(self, families: Sequence[Rows]) -> list[dict[str, float]]:
        kin: dict[tuple[str, str], dict[str, float]] = {}
        out = []
        for rows in families:
            priors = self.kind.priors(rows.key.kernel, rows.key.variant)
            if 2 * len(rows) < FEW_ROWS or len(rows) < FEW_ROWS // 2:
                group = (kernel_class(rows.key.kernel), rows.key.variant)
                if group not in kin:
                    kin[group] = self._pooled(families, group)
                priors = narrowed(priors, kin[group], KIN_SHARE)
            out.append(fit_parameters(self.kind, [self.item(rows)], priors, starts=self.starts))
        return out

    def _pooled(self, families: Sequence[Rows], group: tuple[str, str]) -> dict[str, float]:
        members = [
            r for r in families if (kernel_class(r.key.kernel), r.key.variant) == group and len(r)
        ]
        priors: dict[str, Any] = {}
        for rows in members:
            priors |= self.kind.priors(rows.key.kernel, rows.key.variant)
        return fit_parameters(
            self.kind, [self.item(r) for r in members], priors, starts=self.starts
        )


def errors_percent(predicted: Floats, observed: Floats) -> dict[str, float]:
    """MAPE, median, p90 and bias of predictions, in percent of what was observed."""
    relative = (predicted / observed - 1.0) * 100.0
    size = np.abs(relative)
    return {
        "mape": float(size.mean()),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "bias": float(relative.mean()),
    }


def judged_intervals(fitted: Sequence[Fitted]) -> list[tuple[float, Floats]]:
    """Per family: coverage in percent, and width in percent of every held-out prediction.

    Intervals of one half of the rows are judged on the other, both ways, and averaged over splits.
    """
    coverage = np.zeros(len(fitted))
    width = [np.zeros(f.held_out_s.shape) for f in fitted]
    for seed in INTERVAL_SEEDS:
        first = [half_of_shapes(f.rows, seed) for f in fitted]
        for masks in (first, [~mask for mask in first]):
            intervals = intervals_of(
                [f.held_out_s[:, m] for f, m in zip(fitted, masks, strict=True)],
                [f.rows.observed_s[m] for f, m in zip(fitted, masks, strict=True)],
            )
            for i, (f, m, interval) in enumerate(zip(fitted, masks, intervals, strict=True)):
                judged = covered_percent(interval, f.held_out_s[:, ~m], f.rows.observed_s[~m])
                coverage[i] += judged[0] * np.mean(~m) / len(INTERVAL_SEEDS)
                width[i][:, ~m] += judged[1] / len(INTERVAL_SEEDS)
    return list(zip(coverage.tolist(), width, strict=True))


def as_tables(fitted: Sequence[Fitted], source: str) -> list[dict[str, Any]]:
    """Families of one kind as the tables that ``costmodel/data/families`` holds."""
    intervals = intervals_of([f.held_out_s for f in fitted], [f.rows.observed_s for f in fitted])
    judged = judged_intervals(fitted)
    return [
        _as_table(f, interval, judgement, source)
        for f, interval, judgement in zip(fitted, intervals, judged, strict=True)
    ]


def _as_table(
    fitted: Fitted, interval: Interval, judged: tuple[float, Floats], source: str
) -> dict[str, Any]:
    rows, predicted = fitted.rows, fitted.held_out_s
    roofline = errors_percent(fitted.roofline_s, rows.observed_s)
    held_out = errors_percent(predicted, np.broadcast_to(rows.observed_s, predicted.shape)) | {
        "roofline_mape": roofline["mape"],
        "roofline_median": roofline["median"],
        "roofline_p90": roofline["p90"],
        "coverage": judged[0],
        "interval_width": float(np.median(judged[1])),
    }
    return {
        "kernel": fitted.key.kernel,
        "engine": fitted.key.engine,
        "hardware": fitted.key.hardware,
        "generation": load_hardware(fitted.key.hardware).generation,
        "variant": fitted.key.variant,
        "n_rows": len(rows),
        "source": source,
        "parameters": {k: _rounded(v) for k, v in fitted.parameters.items()},
        "half_fits": _columns(fitted.half_fits),
        "ranges": {k: [float(v.min()), float(v.max())] for k, v in rows.shape.items()},
        "held_out_percent": {k: round(v, 1) for k, v in held_out.items()},
        "interval": {
            "low": _rounded(interval.low),
            "high": _rounded(interval.high),
            "usual": _rounded(interval.usual),
        },
        "generation_spread": GENERATION_SPREAD,
    }


def _columns(fits: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name -> one value per fit, of the parameters that differ between fits."""
    columns = {name: [float(f"{fit[name]:.3g}") for fit in fits] for name in fits[0]}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _rounded(value: float) -> float:
    """Four significant digits: more would only be noise."""
    return float(f"{value:.4g}")
