"""Fit the laws of ``costmodel/power.py`` for single kernels on a table of measured power.

    python scripts/fit_power.py power_b200.csv --output costmodel/data/power.toml

Half of the rows (by a hash of their shape) are fitted and the other half judged, both ways, for
four seeds; the interval of a judged half comes from the fitted half (of both regimes together:
as wide as the scatter of each, of one form). The law written is of all
rows. The law of whole steps is anchored, not fitted: ``STEP``.
"""

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from costmodel.calibration.intervals import pooled
from costmodel.calibration.write import sha256, toml_value
from costmodel.hardware import load_hardware
from costmodel.kernels.kinds import kernel_kind
from costmodel.power import PowerLaw
from costmodel.serving.fit import in_first_half, row_key
from costmodel.validation.kernels import schema_of
from costmodel.validation.power import FACTORS, factor_flags, renamed
from costmodel.validation.table import read_table

Floats = NDArray[np.float64]

HEAD = """\
# Power by regime, written by scripts/fit_power.py; do not edit. Shares of the TDP: docstring of
# costmodel/power.py. held_out_percent: errors and coverage on rows no fit had seen (both halves of
# four splits by a hash of the shape columns; factors and interval from the other half).
# Table: {source}
"""
#: Anchors of whole steps, all published: H100 decode draws 0.43 of its TDP with an empty KV pool
#: (weights stream at about 0.7 of the bandwidth) and 0.86 with a full one; tensor work grows with
#: the root of its rate, as the fitted prefill kernels do (0.9 of the TDP at 0.5 of the peak).
#: Interval: scatter of mean power between dense (0.78) and sparse models (0.70 to 0.73), and of
#: the decode law.
STEP = {
    "gpu": "h100-sxm",
    "parameters": {
        "idle_fraction": 0.30,
        "tensor_fraction": 0.75,
        "tensor_exponent": 0.5,
        "weight_fraction": 0.18,
        "kv_fraction": 0.33,
    },
    "low": 0.8,
    "high": 1.25,
    "sources": [
        "fitted law of decode power on H100: TDP x (0.43 + 0.43 x share of the KV pool in use)",
        "mean power over TDP of published runs: dense 0.78, MoE 0.70 to 0.73",
    ],
}
SCATTER = 0.15
PRIOR_WEIGHT = 0.05
#: What is fitted in each regime: name -> (start, least, most, scale of the prior).
FITTED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "decode": {
        "idle_fraction": (0.4, 0.1, 0.9, 0.3),
        "kv_fraction": (0.3, 0.0, 0.9, 0.3),
    },
    "prefill": {
        "idle_fraction": (0.4, 0.1, 0.9, 0.3),
        "tensor_fraction": (0.6, 0.0, 1.5, 0.3),
        "tensor_exponent": (0.5, 0.1, 1.0, 0.3),
        "kv_fraction": (0.2, 0.0, 0.9, 0.3),
    },
}
FIXED = {
    "idle_fraction": 0.4, "tensor_fraction": 0.0, "tensor_exponent": 0.5,
    "weight_fraction": 0.0, "kv_fraction": 0.0,
}  # fmt: skip
SEEDS = range(4)
#: Share of other rows that an interval aims at, before the correction for few rows.
COVERED_SHARE = 0.80


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rows:
    """Rows of one regime: share of the TDP, attained shares of the peaks, flags of ``FACTORS``."""

    regime: str
    keys: list[str]
    share: Floats
    tensor: Floats
    memory: Floats
    flags: Floats

    def law_share(self, law: PowerLaw, mask: NDArray[np.bool_] | None = None) -> Floats:
        """Predicted P / TDP."""
        logs = np.log([law.factors.get(name, 1.0) for name in FACTORS])
        factor = np.exp(self.flags @ logs)
        share = np.asarray(law.share_of_tdp(self.tensor, 0.0, self.memory, factor))
        return share if mask is None else share[mask]


def rows_of(path: Path, regime: str) -> Rows:
    """One regime's rows of a table."""
    schema = schema_of("decode_attention")
    keys, columns = [], []
    for record in read_table(path).records:
        if record["phase"] != regime:
            continue
        kind, variant, shape = schema.shape_of(renamed(record))
        device = load_hardware(record["device"])
        work = kernel_kind(kind).work(device, shape, variant)
        seconds = float(record["latency_us"]) * 1e-6
        assert device.tdp_w is not None
        observed = {"latency_us", "power", "energy_mj_per_call", "source"}
        keys.append(row_key({c: v for c, v in record.items() if c not in observed}))
        columns.append(
            (
                float(record["power"]) / device.tdp_w,
                float(np.asarray(work.flops)) / work.peak_flops_per_s / seconds,
                float(np.asarray(work.n_bytes)) / device.hbm_bytes_per_s / seconds,
                *factor_flags(record),
            )
        )
    table = np.array(columns)
    return Rows(
        regime=regime,
        keys=keys,
        share=table[:, 0],
        tensor=table[:, 1],
        memory=table[:, 2],
        flags=table[:, 3:],
    )


def law_of(regime: str, x: Floats) -> PowerLaw:
    """A law from the vector that is fitted: parameters, then logarithms of the factors."""
    names = list(FITTED[regime])
    values = FIXED | dict(zip(names, x[: len(names)].tolist(), strict=True))
    factors = dict(zip(FACTORS, np.exp(x[len(names) :]).tolist(), strict=True))
    return PowerLaw(**values, factors=factors)


def fit(rows: Rows, mask: NDArray[np.bool_]) -> PowerLaw:
    """The law of the rows a mask selects."""
    from scipy.optimize import least_squares

    table = np.array([*FITTED[rows.regime].values(), *[(0.0, -1.0, 1.0, 0.3)] * len(FACTORS)])
    start, least, most, scale = table.T
    log_share = np.log(rows.share[mask])

    def residuals(x: Floats) -> Floats:
        predicted = rows.law_share(law_of(rows.regime, x), mask)
        return np.concatenate([np.log(predicted) - log_share, PRIOR_WEIGHT * (x - start) / scale])

    best = least_squares(residuals, start, bounds=(least, most), loss="soft_l1", f_scale=SCATTER)
    return law_of(rows.regime, best.x)


def judged(tables: Sequence[Rows], seed: int) -> list[tuple[Floats, Floats, Floats]]:
    """Of each regime (predicted over observed, observed within the interval, width of the interval
    over the middle), each by a fit of the other half.

    A fit's own residuals are narrower than those of rows it has not seen: its interval is taken
    from a further split of its half.
    """
    first = [_halves(rows, seed) for rows in tables]
    inner = [_halves(rows, seed + 100) for rows in tables]
    out = [(*(np.empty(len(rows.keys)) for _ in range(3)),) for rows in tables]
    for masks in (first, [~mask for mask in first]):
        unseen = [
            np.concatenate(
                [
                    np.log(rows.share[part] / rows.law_share(fit(rows, mask & ~part), part))
                    for part in (mask & half, mask & ~half)
                ]
            )[None, :]
            for rows, mask, half in zip(tables, masks, inner, strict=True)
        ]
        ends = np.exp(pooled(unseen, COVERED_SHARE))
        for (low, high), rows, mask, figures in zip(ends, tables, masks, out, strict=True):
            predicted, observed = rows.law_share(fit(rows, mask), ~mask), rows.share[~mask]
            ratio, inside, width = figures
            ratio[~mask] = predicted / observed
            inside[~mask] = (observed >= low * predicted) & (observed <= high * predicted)
            width[~mask] = high - low
    return out


def _halves(rows: Rows, seed: int) -> NDArray[np.bool_]:
    return np.array([in_first_half(key, seed) for key in rows.keys])


def main() -> None:
    """Fit, judge, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source = f"{arguments.table.name}, aiconfigurator-core 0.12.0, Apache-2.0, SHA-256 "
    lines = [HEAD.format(source=source + sha256(arguments.table))]
    lines += [f'fitted = "{datetime.date.today().isoformat()}"', ""]
    tables = [rows_of(arguments.table, regime) for regime in FITTED]
    results = zip(*(judged(tables, seed) for seed in SEEDS), strict=True)
    by_regime = [[np.stack(f) for f in zip(*splits, strict=True)] for splits in results]
    ends = np.exp(pooled([-np.log(ratio) for ratio, _, _ in by_regime], COVERED_SHARE))
    for rows, (low, high), (ratio, inside, width) in zip(tables, ends, by_regime, strict=True):
        law = fit(rows, np.ones(len(rows.keys), dtype=bool))
        error = np.abs(ratio - 1.0) * 100.0
        figures = {
            "n": len(rows.keys),
            "mape": round(float(error.mean()), 1),
            "median": round(float(np.median(error)), 1),
            "p90": round(float(np.percentile(error, 90)), 1),
            "coverage": round(float(inside.mean()) * 100.0, 1),
            "interval_width": round(float(np.median(width)) * 100.0, 1),
        }
        parameters = {name: round(getattr(law, name), 4) for name in FIXED}
        lines += [
            f"[{rows.regime}]",
            'gpu = "b200-sxm"',
            f"parameters = {toml_value(parameters)}",
            f"factors = {toml_value({k: round(v, 3) for k, v in law.factors.items()})}",
            f"low = {low:.3f}",
            f"high = {high:.3f}",
            f"held_out_percent = {toml_value(figures)}",
            "",
        ]
        print(rows.regime, parameters, dict(law.factors), figures)
    lines += ["[step]", *(f"{key} = {toml_value(value)}" for key, value in STEP.items())]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
