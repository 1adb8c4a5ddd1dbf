"""Fit an engine's parameters on published runs, and judge them on runs no fit has seen.

    minimise  sum rho(log(predicted / observed)) + scatter^2 sum ((log x - log prior) / spread)^2

over the logarithms of the parameters x; rho is the soft L1 loss, so a run that the columns do not
explain pulls little. Engines that serve under load are kin: their prior is the fit to the runs of
all of them together, with ``KIN_SPREAD`` of the spread, so that what an engine's own runs do not
show (another GPU, another class of model) is what its kin do there.

Judging leaves out a set of rows, everywhere: half of them by a hash of their shape columns and a
seed (rows of the same run cannot be on both sides), all of one GPU, of one model, or of one engine.
They are predicted by fits that had seen none of them, and their intervals come from predictions of
the other rows by fits that had seen neither. The parameters written are of all rows.

scipy is imported here only, when a fit runs.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import LccostError, MissingExtraError
from costmodel.intervals import factors, scatter_of
from costmodel.serving.engine_times import EngineTimes, facts_of
from costmodel.serving.metrics import metric, roofline_s
from costmodel.serving.parameters import PRIORS, Parameters, default_parameters
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
#: Share of a prior's spread that is left once kin have been fitted.
KIN_SPREAD = 0.5
JUDGING_SEEDS = (0, 1, 2, 3)
#: Rows below the datasheet roofline of the shape they state are not fitted.
LIMIT_TOLERANCE = 0.95
#: How far off an engine is of which no run was judged (mean |log|): a fifth, like engines left out.
UNJUDGED_SCATTER = 0.2
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
    """Parameters that fit the runs (of which ``masks`` select rows) best.

    ``kin``: what kin of the engine were fitted to; takes the prior's place.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("fitting needs scipy: pip install 'lccost[plan]'") from error
    names = list(PRIORS)
    log_prior = np.log([PRIORS[n][0] if kin is None else getattr(kin, n) for n in names])
    spread = np.array([PRIORS[n][1] for n in names]) * (1.0 if kin is None else KIN_SPREAD)
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


Labels = Callable[[Runs], NDArray[np.str_]]


class Kin:
    """The runs of engines that are kin, and the fits to them without some of their rows."""

    def __init__(self, runs: Sequence[Runs]) -> None:
        self.runs = runs
        self._fits: dict[str, Parameters] = {}

    def without(self, name: str, masks: Callable[[Runs], Bools]) -> Parameters:
        """The fit to the rows that ``masks`` keeps; ``name`` says which these are."""
        if name not in self._fits:
            self._fits[name] = fit(self.runs, [masks(r) for r in self.runs])
        return self._fits[name]


def halves_of(seed: int) -> Labels:
    """Which half of a seeded split each row is in."""
    return lambda r: np.array(["a" if in_first_half(k, seed) else "b" for k in r.keys])


def gpus_of(runs: Runs) -> NDArray[np.str_]:
    """The GPU of each row."""
    return np.full(runs.mask.shape, runs.hardware)


def models_of(runs: Runs) -> NDArray[np.str_]:
    """The model of each row."""
    return np.full(runs.mask.shape, runs.model)


def engines_of(runs: Runs) -> NDArray[np.str_]:
    """The engine of each row."""
    return np.full(runs.mask.shape, runs.engine)


def held_out(
    runs: Sequence[Runs],
    labels: Labels,
    name: str,
    kin: Kin | None = None,
    within: Callable[[Runs], Bools] = lambda r: r.mask,
) -> list[Floats]:
    """Predictions of every row by a fit to the rows of other labels; NaN where ``within`` has none.

    ``name`` tells this labelling of the rows (and ``within``) from others.
    """
    own = [labels(r) for r in runs]
    inside = [within(r) & r.mask for r in runs]
    out = [np.full(r.observed_s.shape, np.nan) for r in runs]
    for label in sorted({x for k, m in zip(own, inside, strict=True) for x in k[m].tolist()}):
        masks = [m & (k != label) for k, m in zip(own, inside, strict=True)]

        def others(r: Runs, label: str = label) -> Bools:
            kept: Bools = within(r) & (labels(r) != label)
            return kept

        start = kin.without(f"{name}:{label}", others) if kin is not None else None
        parameters = start or default_parameters()
        if any(m.any() for m in masks):
            parameters = fit(runs, masks, kin=start)
        for seconds, r, k, m in zip(out, runs, own, inside, strict=True):
            left_out = m & (k == label)
            seconds[left_out] = r.predicted_s(parameters, left_out)
    return out


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Judged:
    """Predictions of every run by fits that had not seen it; one row per judging seed.

    inside, width   whether the run lies in the interval that came from other runs, and
                    (high - low) / mid of it; NaN where none was made
    """

    predicted_s: Floats
    observed_s: Floats
    roofline_s: Floats
    metric_class: NDArray[np.str_]
    hardware: NDArray[np.str_]
    inside: NDArray[Any]
    width: Floats

    def where(self, mask: Bools) -> "Judged":
        """The runs a mask selects."""
        return Judged(
            predicted_s=self.predicted_s[:, mask],
            observed_s=self.observed_s[mask],
            roofline_s=self.roofline_s[mask],
            metric_class=self.metric_class[mask],
            hardware=self.hardware[mask],
            inside=self.inside[:, mask],
            width=self.width[:, mask],
        )


def judge(
    runs: Sequence[Runs], kin: Kin | None = None, seeds: Sequence[int] = JUDGING_SEEDS
) -> Judged:
    """Predict each half by fits of the other, with intervals from splits of the other."""
    predicted, inside, width = [], [], []
    whole = _judged(runs, np.full((1, sum(int(r.mask.sum()) for r in runs)), np.nan))
    for seed in seeds:
        labels, inner = halves_of(seed), halves_of(seed + 100)
        seconds = _joined(runs, held_out(runs, labels, f"half {seed}", kin))
        half = _joined(runs, [labels(r) for r in runs])
        low, high = np.empty(half.shape), np.empty(half.shape)
        for fitted in ("a", "b"):
            unseen = held_out(
                runs,
                inner,
                f"half {seed} {fitted}",
                kin,
                functools.partial(_labelled, labels, fitted),
            )
            scatter = scatter_by_class(_judged(runs, _joined(runs, unseen)[None, :]))
            judged = half != fitted
            low[judged], high[judged] = factors(scatter_at(scatter, whole, judged))
        ratio = _joined(runs, [r.observed_s for r in runs]) / seconds
        predicted.append(seconds)
        inside.append((ratio >= low) & (ratio <= high))
        width.append(high - low)
    return replace(
        _judged(runs, np.stack(predicted)), inside=np.stack(inside), width=np.stack(width)
    )


def leave_out(runs: Sequence[Runs], labels: Labels, name: str, kin: Kin | None = None) -> Judged:
    """Predict the rows of each label (a GPU, a model, an engine) by fits to all others'.

    Intervals come from the errors on the other labels, each left out in its turn.
    """
    judged = _judged(runs, _joined(runs, held_out(runs, labels, name, kin))[None, :])
    own = joined(runs, labels)
    low, high = np.empty(own.shape), np.empty(own.shape)
    for label in set(own.tolist()):
        here = own == label
        scatter = scatter_by_class(judged.where(~here), own[~here])
        low[here], high[here] = factors(scatter_at(scatter, judged, here))
    ratio = judged.observed_s / judged.predicted_s
    return replace(judged, inside=(ratio >= low) & (ratio <= high), width=(high - low)[None, :])


def metric_classes(runs: Sequence[Runs]) -> NDArray[np.str_]:
    """The class of metric of every row that counts."""
    return np.concatenate([np.full(r.mask.sum(), r.metric_class) for r in runs])


def _labelled(labels: Labels, label: str, runs: Runs) -> Bools:
    mask: Bools = labels(runs) == label
    return mask


def joined(runs: Sequence[Runs], read: Labels) -> NDArray[np.str_]:
    """The label of every row that counts."""
    return _joined(runs, [read(r) for r in runs])


def _joined(runs: Sequence[Runs], arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([a[r.mask] for a, r in zip(arrays, runs, strict=True)])


def _judged(runs: Sequence[Runs], predicted_s: Floats) -> Judged:
    known = np.full(predicted_s.shape, np.nan)
    return Judged(
        predicted_s=predicted_s,
        observed_s=np.concatenate([r.observed_s[r.mask] for r in runs]),
        roofline_s=np.concatenate([r.roofline_s[r.mask] for r in runs]),
        metric_class=metric_classes(runs),
        hardware=np.concatenate([np.full(r.mask.sum(), r.hardware) for r in runs]),
        inside=known,
        width=known,
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


#: Scatter by class of metric and GPU; "" is any other.
Scatters = dict[str, dict[str, float]]


def scatter_by_class(judged: Judged, left_out: NDArray[np.str_] | None = None) -> Scatters:
    """Mean size of the errors on unseen runs, from an engine's to a class's to a GPU's.

    ``left_out``: what each run was left out with. Runs of one GPU (or model, or engine) that no fit
    had seen err together: they count as one run, and GPUs are not told apart.
    """
    known = np.isfinite(judged.predicted_s).all(axis=0)
    sizes = np.abs(np.log(judged.observed_s / judged.predicted_s))[:, known]
    classes, gpus = judged.metric_class[known], judged.hardware[known]
    if left_out is not None:
        both = np.stack([classes, left_out[known]])
        pairs, where = np.unique(both, axis=1, return_inverse=True)
        every = range(pairs.shape[1])
        sizes = np.array([[sizes[:, where.ravel() == i].mean() for i in every]])
        classes, gpus = pairs[0], np.full(pairs.shape[1], "")
    everywhere = scatter_of(sizes, UNJUDGED_SCATTER)
    out: Scatters = {"": {"": everywhere}}
    for name in sorted(set(classes.tolist())):
        mine = classes == name
        whole = scatter_of(sizes[:, mine], everywhere)
        out[name] = {"": whole}
        for gpu in sorted(set(gpus[mine].tolist()) - {""}):
            out[name][gpu] = scatter_of(sizes[:, mine & (gpus == gpu)], whole)
    return out


def scatter_at(scatter: Scatters, judged: Judged, mask: Bools) -> Floats:
    """The scatter of every row that a mask selects."""
    tables = [scatter.get(name, scatter[""]) for name in judged.metric_class[mask].tolist()]
    gpus = judged.hardware[mask].tolist()
    return np.array([t.get(gpu, t[""]) for t, gpu in zip(tables, gpus, strict=True)])


def class_table(judged: Judged, here: Scatters, elsewhere: Scatters) -> dict[str, dict[str, Any]]:
    """Errors, coverage and scatter by class of metric: on the GPUs of the runs, and where whole
    groups are left out.
    """
    out = {}
    for name in sorted(set(judged.metric_class.tolist())):
        part = judged.where(judged.metric_class == name)
        figures = errors_percent(part)
        if np.isfinite(part.width).all():
            figures |= {
                "coverage": float(np.mean(part.inside) * 100.0),
                "interval_width": float(np.median(part.width) * 100.0),
            }
        gpus = {gpu: round(s, 4) for gpu, s in here[name].items() if gpu}
        out[name] = {k: round(v, 1) for k, v in figures.items()} | {
            "scatter": round(elsewhere.get(name, elsewhere[""])[""], 4),
            "gpu_scatter": gpus,
        }
    return out


def engine_table(
    parameters: Parameters, judged: Judged, here: Scatters, elsewhere: Scatters, gpus: Sequence[str]
) -> Mapping[str, Any]:
    """One engine as a table of ``costmodel/data/serving.toml``; see ``class_table``."""
    return {
        "n_rows": int(judged.observed_s.size),
        "gpus": sorted(set(gpus)),
        "parameters": {
            f.name: float(f"{getattr(parameters, f.name):.4g}") for f in fields(Parameters)
        },
        "held_out_percent": class_table(judged, here, elsewhere),
    }
