"""Fit an engine's parameters on published runs.

    minimise  sum rho(log(predicted / observed)) + scatter^2 sum ((log x - log prior) / spread)^2

over the logarithms of the parameters x within their limits; rho is the soft L1 loss, so a run that
the columns do not explain pulls little. Runs of dense models and of those with routed experts are
fitted apart: what an engine's scheduler and kernels do with the one says little of the other
(carried over, they predicted dense models 2.3 times too slow). Engines that serve under load are
kin: their prior is the fit to the runs of all of them together, with ``KIN_SPREAD`` of the spread,
so that what an engine's own runs do not show (another GPU, another model) is what its kin do there.

Runs that no fit has seen judge it: ``costmodel.serving.judging``.

scipy is imported here only, when a fit runs.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import LccostError, MissingExtraError
from costmodel.serving.engine_times import EngineTimes, facts_of
from costmodel.serving.metrics import metric, roofline_s
from costmodel.serving.parameters import LIMITS, PRIORS, Parameters
from costmodel.validation.cases import Case, Row, load_of, served_case
from costmodel.validation.devices import Devices
from costmodel.validation.end_to_end import SPARSE, grouped_rows, metric_class
from costmodel.validation.memory_blocks import bare_method
from costmodel.validation.table import Record

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: Scale of the robust loss, in the logarithm; weight of the priors.
SCATTER = 0.08
PRIOR_WEIGHT = 0.1
#: Share of a prior's spread that is left once kin have been fitted.
KIN_SPREAD = 0.35
#: Rows below the datasheet roofline of the shape they state are not fitted.
LIMIT_TOLERANCE = 0.95
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
    observed_s: Floats
    roofline_s: Floats
    prompt_tokens: Floats
    keys: tuple[str, ...]
    mask: Bools

    @property
    def is_sparse(self) -> bool:
        """Whether the model has routed experts."""
        return self.metric_class.endswith(SPARSE)

    def predicted_s(self, parameters: Parameters, mask: Bools) -> Floats:
        """Predictions of the rows that a mask and the runs' own both select."""
        seconds = np.broadcast_to(self.seconds(parameters), self.observed_s.shape)
        out: Floats = seconds[mask & self.mask]
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
    stated = np.broadcast_to(roofline_s(kind, served, load), shape)
    return Runs(
        engine=case.engine,
        hardware=served.run.hardware.name,
        model=served.architecture.name,
        metric_class=metric_class(kind, served),
        seconds=metric(kind, times, served, load),
        observed_s=observed,
        roofline_s=stated,
        prompt_tokens=np.array([r.input_tokens for r in rows]),
        keys=tuple(row_key(table.records[r.index]) for r in rows),
        mask=np.isfinite(observed) & (observed >= LIMIT_TOLERANCE * stated),
    )


def fit(
    runs: Sequence[Runs],
    masks: Sequence[Bools] | None = None,
    *,
    kin: Parameters | None = None,
) -> Parameters:
    """Parameters that fit the runs (of which ``masks`` select rows) best; all of one class.

    ``kin``: what kin of the engine were fitted to; takes the prior's place.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("fitting needs scipy: pip install 'lccost[plan]'") from error
    fixed = {} if _own_attention(runs) else {"prompt_attention_factor": 1.0}
    names = [n for n in PRIORS if n not in fixed]
    log_prior = np.log([PRIORS[n][0] if kin is None else getattr(kin, n) for n in names])
    spread = np.array([PRIORS[n][1] for n in names]) * (1.0 if kin is None else KIN_SPREAD)
    chosen = [r.mask for r in runs] if masks is None else masks
    log_observed = [np.log(r.observed_s[m & r.mask]) for r, m in zip(runs, chosen, strict=True)]

    def residuals(x: Floats) -> Floats:
        parameters = Parameters(**fixed, **dict(zip(names, np.exp(x).tolist(), strict=True)))
        parts = [
            np.log(r.predicted_s(parameters, m)) - o
            for r, m, o in zip(runs, chosen, log_observed, strict=True)
        ]
        return np.concatenate([*parts, PRIOR_WEIGHT * (x - log_prior) / spread])

    least, most = np.log([LIMITS.get(n, (1e-12, 1e12)) for n in names]).T
    start = np.clip(log_prior, least + 1e-6, most - 1e-6)
    best = least_squares(residuals, start, loss="soft_l1", f_scale=SCATTER, bounds=(least, most))
    return Parameters(**fixed, **dict(zip(names, np.exp(best.x).tolist(), strict=True)))


def _own_attention(runs: Sequence[Runs]) -> bool:
    return bool(runs) and all(facts_of(r.engine).own_attention for r in runs)


class Kin:
    """The runs of engines that are kin, and the fits to them without some of their rows."""

    def __init__(self, runs: Sequence[Runs]) -> None:
        self.runs = runs
        self._fits: dict[tuple[str, bool], Parameters] = {}

    def without(self, name: str, masks: Callable[[Runs], Bools], *, sparse: bool) -> Parameters:
        """The fit to the rows of a class that ``masks`` keeps; ``name`` says which these are."""
        if (name, sparse) not in self._fits:
            runs = [r for r in self.runs if r.is_sparse == sparse]
            self._fits[name, sparse] = fit(runs, [masks(r) for r in runs])
        return self._fits[name, sparse]
