"""Fit an engine's parameters on published runs, and judge them on runs no fit has seen.

    minimise  sum rho(log(predicted / observed)) + scatter^2 sum ((log x - log prior) / spread)^2

over the logarithms of the parameters x; rho is the soft L1 loss, so a run that the columns do not
explain pulls little. Rows are split into halves by a hash of their shape columns and a seed: rows
of the same run cannot be on both sides. Each half is predicted by a fit of the other; from these
predictions come the errors and the intervals. The parameters written are of all rows.

scipy is imported here only, when a fit runs.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import LccostError, MissingExtraError
from costmodel.serving.engine_times import EngineTimes, facts_of
from costmodel.serving.metrics import metric, roofline_s
from costmodel.serving.parameters import PRIORS, Parameters
from costmodel.validation.cases import Case, Row, load_of, served_case
from costmodel.validation.devices import Devices
from costmodel.validation.end_to_end import grouped_rows, metric_class
from costmodel.validation.memory_blocks import bare_method
from costmodel.validation.table import Record

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Scale of the robust loss, in the logarithm; weight of the priors.
SCATTER = 0.08
PRIOR_WEIGHT = 0.1
JUDGING_SEEDS = (0, 1, 2, 3)
#: Rows below the datasheet roofline of the shape they state are not fitted.
LIMIT_TOLERANCE = 0.95
#: Share of unseen rows that an interval holds, and the rows a class needs for one of its own.
COVERED_SHARE = 0.81
INTERVAL_ROWS = 20
#: Labels that are fitted though they are not in the overall figures.
_FITTED_LABELS = frozenset({"output_throughput", "max_throughput"})
#: Columns that are no part of a row's shape.
_NOT_SHAPE = frozenset(
    {"id", "row_id", "origin", "source", "note", "value", "n_rows"}
    | {"silicon_tpot_ms", "silicon_ttft_ms"}
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Table:
    """One table as the fit needs it.

    read      row -> its case and metrics
    observed  row, label -> seconds
    """

    records: Sequence[Record]
    read: Callable[[Record, int], tuple[Case, list[Row]]]
    observed: Callable[[Record, str], float]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Runs:
    """Runs of one case and metric; arrays have one entry per row.

    seconds   parameters -> predictions of all rows
    mask      rows that count
    """

    engine: str
    hardware: str
    model: str
    metric_class: str
    seconds: Callable[[Parameters], Any]
    floor_s: Floats
    observed_s: Floats
    roofline_s: Floats
    prompt_tokens: Floats
    keys: tuple[str, ...]
    mask: Bools

    def predicted_s(self, parameters: Parameters, mask: Bools) -> Floats:
        """Predictions of the rows that a mask and the runs' own both select."""
        seconds = np.broadcast_to(self.seconds(parameters), self.observed_s.shape)
        out: Floats = np.maximum(seconds, self.floor_s)[mask & self.mask]
        return out


def row_key(record: Record) -> str:
    """The shape columns of a row as one text: runs repeated in a table share it."""
    return "|".join(f"{c}={record[c]}" for c in sorted(record) if c not in _NOT_SHAPE)


def in_first_half(key: str, seed: int) -> bool:
    """A fair coin per run, the same on every machine."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()[0] < 128


def read_runs(tables: Sequence[Table], times: EngineTimes, *, everyone: bool = False) -> list[Runs]:
    """One engine's runs that can be modelled and that the device could have made.

    Runs of methods count only where the engine brings their kernels. ``everyone`` takes the runs of
    all engines.
    """
    devices = Devices(None)
    out: list[Runs] = []
    for table in tables:
        grouped, _ = grouped_rows(table.records, table.read)
        for case, rows in grouped.items():
            own = facts_of(case.engine).with_method
            packed = "bits=" in case.method and case.level == "ideal"
            if not (packed or bare_method(case.method) == own):
                continue
            if not (case.engine == times.name or (everyone and own == "full" and not packed)):
                continue
            # Not: first tokens under load or of a first run, times that users reported as bugs.
            judged = [r for r in rows if r.primary or r.label in _FITTED_LABELS]
            for kind in dict.fromkeys(r.metric for r in judged):
                members = [r for r in judged if r.metric == kind]
                try:
                    out.append(_runs(table, case, kind, members, times, devices))
                except LccostError:
                    continue
    return [r for r in out if r.mask.any()]


def _runs(
    table: Table, case: Case, kind: str, rows: Sequence[Row], times: EngineTimes, devices: Devices
) -> Runs:
    served = served_case(case, devices, times)
    load = load_of(rows)
    observed = np.array([table.observed(table.records[r.index], r.label) for r in rows])
    shape = observed.shape
    floor = np.zeros(shape)
    if kind == "tpot":
        floor = np.asarray(times.host_floor_s(served, load.concurrency, case.version))
    stated = np.broadcast_to(roofline_s(kind, served, load), shape)
    return Runs(
        engine=case.engine,
        hardware=served.run.hardware.name,
        model=served.architecture.name,
        metric_class=metric_class(kind, served),
        seconds=metric(kind, times, served, load),
        floor_s=np.broadcast_to(floor, shape),
        observed_s=observed,
        roofline_s=stated,
        prompt_tokens=np.array([r.input_tokens for r in rows]),
        keys=tuple(row_key(table.records[r.index]) for r in rows),
        mask=np.isfinite(observed) & (observed >= LIMIT_TOLERANCE * stated),
    )


def fit(runs: Sequence[Runs], masks: Sequence[Bools] | None = None) -> Parameters:
    """Parameters that fit the runs (of which ``masks`` select rows) best."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("fitting needs scipy: pip install 'lccost[plan]'") from error
    names = list(PRIORS)
    log_prior = np.log([PRIORS[n][0] for n in names])
    spread = np.array([PRIORS[n][1] for n in names])
    chosen = [r.mask for r in runs] if masks is None else masks
    log_observed = [np.log(r.observed_s[m & r.mask]) for r, m in zip(runs, chosen, strict=True)]

    def residuals(x: Floats) -> Floats:
        parameters = Parameters(**dict(zip(names, np.exp(x).tolist(), strict=True)))
        parts = [
            np.log(r.predicted_s(parameters, m)) - o
            for r, m, o in zip(runs, chosen, log_observed, strict=True)
        ]
        return np.concatenate([*parts, PRIOR_WEIGHT * (x - log_prior) / spread])

    best = least_squares(residuals, log_prior, loss="soft_l1", f_scale=SCATTER)
    return Parameters(**dict(zip(names, np.exp(best.x).tolist(), strict=True)))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Judged:
    """Predictions of every run by fits that had not seen it; one row per judging seed."""

    predicted_s: Floats
    observed_s: Floats
    roofline_s: Floats
    metric_class: NDArray[np.str_]

    def where(self, mask: Bools) -> "Judged":
        """The runs a mask selects."""
        return Judged(
            predicted_s=self.predicted_s[:, mask],
            observed_s=self.observed_s[mask],
            roofline_s=self.roofline_s[mask],
            metric_class=self.metric_class[mask],
        )


def judge(runs: Sequence[Runs], seeds: Sequence[int] = JUDGING_SEEDS) -> Judged:
    """Predict each half by a fit of the other."""
    predicted = []
    for seed in seeds:
        halves = [np.array([in_first_half(k, seed) for k in r.keys], dtype=np.bool_) for r in runs]
        seconds = [np.full(r.observed_s.shape, np.nan) for r in runs]
        for first in (True, False):
            parameters = fit(runs, [h == first for h in halves])
            for out, r, h in zip(seconds, runs, halves, strict=True):
                out[(h != first) & r.mask] = r.predicted_s(parameters, h != first)
        predicted.append(np.concatenate([s[r.mask] for s, r in zip(seconds, runs, strict=True)]))
    return Judged(
        predicted_s=np.stack(predicted),
        observed_s=np.concatenate([r.observed_s[r.mask] for r in runs]),
        roofline_s=np.concatenate([r.roofline_s[r.mask] for r in runs]),
        metric_class=np.concatenate([np.full(r.mask.sum(), r.metric_class) for r in runs]),
    )


def errors_percent(judged: Judged) -> dict[str, float]:
    """Errors on unseen rows, beside those of the datasheet roofline."""
    relative = (judged.predicted_s / judged.observed_s - 1.0) * 100.0
    size = np.abs(relative)
    roofline = np.abs(judged.roofline_s / judged.observed_s - 1.0) * 100.0
    return {
        "n": float(judged.observed_s.size),
        "mape": float(size.mean()),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "bias": float(relative.mean()),
        "roofline_mape": float(roofline.mean()),
    }


def shortest(log_ratio: Floats, share: float = COVERED_SHARE) -> tuple[float, float]:
    """Factors of the shortest interval around 1 that holds a share of the ratios."""
    ratios = np.sort(np.append(log_ratio.ravel(), 0.0))
    n_inside = min(max(int(np.ceil(share * ratios.size)), 2), ratios.size)
    widths = ratios[n_inside - 1 :] - ratios[: ratios.size - n_inside + 1]
    # Only intervals that hold the prediction itself.
    here = int(np.searchsorted(ratios, 0.0))
    starts = np.arange(widths.size)
    around = (starts <= here) & (starts + n_inside - 1 >= here)
    start = int(starts[around][np.argmin(widths[around])])
    return float(np.exp(ratios[start])), float(np.exp(ratios[start + n_inside - 1]))


def class_table(judged: Judged) -> dict[str, dict[str, float]]:
    """Errors and interval factors by class of metric.

    A class with few rows takes its interval from all rows of the engine.
    """
    ratio = np.log(judged.observed_s / judged.predicted_s)
    out = {}
    for name in sorted(set(judged.metric_class.tolist())):
        mask = judged.metric_class == name
        low, high = shortest(ratio[:, mask] if mask.sum() >= INTERVAL_ROWS else ratio)
        inside = (ratio[:, mask] >= np.log(low)) & (ratio[:, mask] <= np.log(high))
        figures = errors_percent(judged.where(mask)) | {"coverage": float(inside.mean() * 100.0)}
        out[name] = {k: round(v, 1) for k, v in figures.items()} | {
            "low": round(low, 3),
            "high": round(high, 3),
        }
    return out


def engine_table(parameters: Parameters, judged: Judged) -> Mapping[str, Any]:
    """One engine as a table of ``costmodel/data/serving.toml``."""
    return {
        "n_rows": int(judged.observed_s.size),
        "parameters": {
            f.name: float(f"{getattr(parameters, f.name):.4g}") for f in fields(Parameters)
        },
        "held_out_percent": class_table(judged),
    }
