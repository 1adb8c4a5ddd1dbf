"""Judge the fits of engines on runs that no fit has seen.

Judging leaves out a set of rows, everywhere: half of them by a hash of their shape columns and a
seed (rows of the same run cannot be on both sides), all of one GPU, of one model, or of one engine.
They are predicted by fits that had seen none of them. Intervals come from errors on the other rows:
of halves, by fits that had seen neither; of a GPU, a model or an engine, on the others left out in
their turn, by fits that had seen this one. The parameters written are of all rows.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodel.intervals import factors, scatter_of
from costmodel.serving.fit import Bools, Floats, Kin, Runs, fit, in_first_half
from costmodel.serving.parameters import Parameters

Labels = Callable[[Runs], NDArray[np.str_]]

JUDGING_SEEDS = (0, 1, 2, 3)
#: How far off an engine is of which no run was judged (mean |log|): a fifth, like engines left out.
UNJUDGED_SCATTER = 0.2


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
    out: list[Floats] = [np.empty(0)] * len(runs)
    for sparse in (False, True):
        members = [i for i, r in enumerate(runs) if r.is_sparse == sparse]
        found = _held_out([runs[i] for i in members], labels, name, kin, within)
        for i, seconds in zip(members, found, strict=True):
            out[i] = seconds
    return out


def _held_out(
    runs: Sequence[Runs],
    labels: Labels,
    name: str,
    kin: Kin | None,
    within: Callable[[Runs], Bools],
) -> list[Floats]:
    """The same for runs of one class of models."""
    own = [labels(r) for r in runs]
    inside = [within(r) & r.mask for r in runs]
    out = [np.full(r.observed_s.shape, np.nan) for r in runs]
    for label in sorted({x for k, m in zip(own, inside, strict=True) for x in k[m].tolist()}):
        masks = [m & (k != label) for k, m in zip(own, inside, strict=True)]

        def others(r: Runs, label: str = label) -> Bools:
            kept: Bools = within(r) & (labels(r) != label)
            return kept

        start = None
        if kin is not None:
            start = kin.without(f"{name}:{label}", others, sparse=runs[0].is_sparse)
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
    fits: Mapping[str, Parameters], judged: Judged, here: Scatters, elsewhere: Scatters
) -> Mapping[str, Any]:
    """One engine as a table of ``costmodel/data/serving.toml``; see ``class_table``.

    ``fits``: key of the table -> parameters.
    """
    return {
        "n_rows": int(judged.observed_s.size),
        "gpus": sorted(set(judged.hardware.tolist())),
        **{
            key: {f.name: float(f"{getattr(fit, f.name):.4g}") for f in fields(Parameters)}
            for key, fit in fits.items()
        },
        "held_out_percent": class_table(judged, here, elsewhere),
    }
