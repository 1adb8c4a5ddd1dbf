"""Fit an engine's parameters on a table of serving runs, and judge them on runs no fit has seen.

    minimise  sum rho(log(predicted / observed)) + scatter^2 sum ((log x - log prior) / spread)^2

over the logarithms of the parameters x; rho is the soft L1 loss, so a run that the columns do not
explain pulls little. Rows are split into halves by a hash of their shape columns and a seed: rows
of the same run cannot be on both sides. Each half is predicted by a fit of the other; from these
predictions come the errors and the interval. The parameters written are of all rows.

scipy is imported here only, when a fit runs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import LccostError, MissingExtraError
from costmodel.serving.engine_times import (
    EngineTimes,
    Parameters,
    Terms,
    host_floor_s,
    terms_of,
    tpot_from,
)
from costmodel.serving.served import Parts
from costmodel.validation.cells import observed_value
from costmodel.validation.devices import Devices
from costmodel.validation.serving import COLUMNS, grouped_rows, load_of, served_case
from costmodel.validation.serving_rows import Case
from costmodel.validation.table import Record

Floats = NDArray[np.float64]

#: parameter -> (prior, spread of its logarithm). Priors: kernels in a step take what they take
#: alone; weights stream at 0.7 to 0.9 of the bandwidth; prefill interferes once.
PRIORS: Mapping[str, tuple[float, float]] = {
    "step_s": (4e-4, 1.0),
    "layer_s": (4e-6, 1.0),
    "dense_factor": (1.0, 0.25),
    "expert_factor_16": (1.4, 0.5),
    "expert_factor_8": (1.3, 0.5),
    "expert_factor_4": (1.1, 0.5),
    "expert_factor_integer": (1.5, 0.5),
    "expert_factor_prefill": (1.6, 0.6),
    "expert_layer_s": (1.5e-5, 1.0),
    "collective_factor": (0.8, 0.6),
    "prefill_share": (1.0, 0.4),
}
#: Scale of the robust loss, in the logarithm; weight of the priors.
SCATTER = 0.08
PRIOR_WEIGHT = 0.1
JUDGING_SEEDS = (0, 1, 2, 3)
#: Rows below the datasheet roofline of the shape they state are not fitted.
LIMIT_TOLERANCE = 0.95
#: Share of unseen rows that an interval holds, and the rows a class needs for one of its own.
COVERED_SHARE = 0.81
INTERVAL_ROWS = 30


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Runs:
    """Measured runs of one deployment: one entry per row.

    floor_s   what the host needs at least, whatever the parameters
    """

    case: Case
    terms: Terms
    sparse: bool
    floor_s: Floats
    observed_s: Floats
    keys: tuple[str, ...]

    def predicted_s(self, parameters: Parameters) -> Floats:
        """Seconds per output token."""
        seconds = tpot_from(parameters, self.terms, self.case.precision)
        return np.maximum(seconds, self.floor_s)

    def where(self, mask: NDArray[np.bool_]) -> "Runs":
        """The rows a mask selects."""
        return replace(
            self,
            terms=_taken(self.terms, mask),
            floor_s=self.floor_s[mask],
            observed_s=self.observed_s[mask],
            keys=tuple(k for k, m in zip(self.keys, mask, strict=True) if m),
        )


def row_key(record: Record) -> str:
    """The shape columns of a row as one text: runs repeated in a table share it."""
    skipped = {"id", "origin", "source", *COLUMNS.values()}
    return "|".join(f"{c}={record[c]}" for c in sorted(record) if c not in skipped)


def in_first_half(key: str, seed: int) -> bool:
    """A fair coin per run, the same on every machine."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()[0] < 128


def read_runs(
    records: Sequence[Record], engine: str, times: EngineTimes, *, everyone: bool = False
) -> list[Runs]:
    """One engine's runs that can be modelled and that the device could have made.

    ``everyone`` takes the runs of all engines, as if they were this one's.
    """
    devices = Devices(None)
    out: list[Runs] = []
    grouped, _ = grouped_rows(records)
    for case, items in grouped.items():
        if not everyone and case.engine != engine:
            continue
        try:
            served = served_case(case, devices, times)
        except LccostError:
            continue
        rows = [records[i] for i, _ in items]
        load = load_of([x for _, x in items])
        stated = served.step(
            load.concurrency, np.asarray(load.input_tokens) + load.output_tokens / 2.0
        )
        runs = Runs(
            case=case,
            terms=terms_of(times, served, load),
            sparse=served.n_expert_layers > 0,
            floor_s=np.asarray(host_floor_s(times, served, load, case.version)),
            observed_s=np.array([observed_value(r, COLUMNS["tpot"]) * 1e-3 for r in rows]),
            keys=tuple(map(row_key, rows)),
        )
        possible = runs.observed_s >= LIMIT_TOLERANCE * stated.roofline_s
        if possible.any():
            out.append(runs.where(possible))
    return out


def _taken(terms: Terms, mask: NDArray[np.bool_]) -> Terms:
    def parts(p: Parts) -> Parts:
        return Parts(
            **{f.name: np.broadcast_to(getattr(p, f.name), mask.shape)[mask] for f in fields(Parts)}
        )

    return replace(
        terms,
        step=parts(terms.step),
        prompt=parts(terms.prompt),
        prompts_per_token=np.asarray(terms.prompts_per_token)[mask],
    )


def fit(runs: Sequence[Runs]) -> Parameters:
    """Parameters that fit the runs best."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("fitting needs scipy: pip install 'lccost[plan]'") from error
    names = list(PRIORS)
    log_prior = np.log([PRIORS[n][0] for n in names])
    spread = np.array([PRIORS[n][1] for n in names])

    def residuals(x: Floats) -> Floats:
        parameters = Parameters(**dict(zip(names, np.exp(x).tolist(), strict=True)))
        parts = [np.log(r.predicted_s(parameters) / r.observed_s) for r in runs]
        return np.concatenate([*parts, PRIOR_WEIGHT * (x - log_prior) / spread])

    best = least_squares(residuals, log_prior, loss="soft_l1", f_scale=SCATTER)
    return Parameters(**dict(zip(names, np.exp(best.x).tolist(), strict=True)))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Judged:
    """Predictions of every run by fits that had not seen it; one row per judging seed."""

    predicted_s: Floats
    observed_s: Floats
    sparse: NDArray[np.bool_]
    roofline_s: Floats


def judge(runs: Sequence[Runs], seeds: Sequence[int] = JUDGING_SEEDS) -> Judged:
    """Predict each half by a fit of the other."""
    predicted = []
    for seed in seeds:
        halves = [np.array([in_first_half(k, seed) for k in r.keys], dtype=np.bool_) for r in runs]
        seconds = [np.full(r.observed_s.shape, np.nan) for r in runs]
        for first in (True, False):
            masks = [h == first for h in halves]
            parameters = fit([r.where(m) for r, m in zip(runs, masks, strict=True) if m.any()])
            for out, r, m in zip(seconds, runs, masks, strict=True):
                out[~m] = r.predicted_s(parameters)[~m]
        predicted.append(np.concatenate(seconds))
    return Judged(
        predicted_s=np.stack(predicted),
        observed_s=np.concatenate([r.observed_s for r in runs]),
        sparse=np.concatenate([np.full(r.observed_s.shape, r.sparse) for r in runs]),
        roofline_s=np.concatenate([r.terms.step.roofline_s for r in runs]),
    )


def errors_percent(judged: Judged, sparse: bool) -> dict[str, float]:
    """Errors of one class of models on unseen rows; empty where there are none."""
    mask = judged.sparse == sparse
    if not mask.any():
        return {}
    relative = (judged.predicted_s[:, mask] / judged.observed_s[mask] - 1.0) * 100.0
    size = np.abs(relative)
    roofline = np.abs(judged.roofline_s[mask] / judged.observed_s[mask] - 1.0) * 100.0
    low, high = interval(judged, sparse)
    ratio = judged.observed_s[mask] / judged.predicted_s[:, mask]
    return {
        "n": float(mask.sum()),
        "mape": float(size.mean()),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "bias": float(relative.mean()),
        "roofline_mape": float(roofline.mean()),
        "coverage": float(((ratio >= low) & (ratio <= high)).mean() * 100.0),
        "interval_width": (high - low) * 100.0,
    }


def interval(judged: Judged, sparse: bool) -> tuple[float, float]:
    """Factors on a prediction that hold most unseen rows of one class."""
    mask = judged.sparse == sparse
    if mask.sum() < INTERVAL_ROWS:
        mask = np.ones(judged.sparse.shape, dtype=np.bool_)
    return shortest(np.log(judged.observed_s[mask] / judged.predicted_s[:, mask]))


def shortest(log_ratio: Floats, share: float = COVERED_SHARE) -> tuple[float, float]:
    """Factors of the shortest interval around 1 that holds a share of the ratios."""
    ratios = np.sort(np.append(log_ratio.ravel(), 0.0))
    n_inside = min(max(int(np.ceil(share * ratios.size)), 2), ratios.size)
    widths = ratios[n_inside - 1 :] - ratios[: ratios.size - n_inside + 1]
    # Only intervals that hold the prediction itself.
    first = int(np.searchsorted(ratios, 0.0))
    starts = np.arange(widths.size)
    around = (starts <= first) & (starts + n_inside - 1 >= first)
    start = int(starts[around][np.argmin(widths[around])])
    return float(np.exp(ratios[start])), float(np.exp(ratios[start + n_inside - 1]))


def engine_table(parameters: Parameters, judged: Judged) -> dict[str, Any]:
    """One engine as a table of ``costmodel/data/serving.toml``."""
    ends = [interval(judged, sparse) for sparse in (False, True)]
    return {
        "n_rows": int(judged.observed_s.size),
        "parameters": {
            f.name: float(f"{getattr(parameters, f.name):.4g}") for f in fields(Parameters)
        },
        "interval": {
            "low": [round(low, 3) for low, _ in ends],
            "high": [round(high, 3) for _, high in ends],
        },
        "held_out_percent": {
            name: {k: round(v, 1) for k, v in errors_percent(judged, sparse).items()}
            for name, sparse in (("dense", False), ("sparse", True))
        },
    }
