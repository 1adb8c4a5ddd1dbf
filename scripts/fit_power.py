"""Fit the idle and activity law of ``costmodel/activity_power.py`` on a table of measured power.

    python scripts/fit_power.py power_b200.csv --output costmodel/data/power.toml

Half of the rows (by a hash of their shape) are fitted and the other half judged, both ways; the law
written is of all rows.
"""

import argparse
import datetime
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.activity_power import PowerParameters
from costmodel.calibration.write import sha256, toml_value
from costmodel.hardware import load_hardware
from costmodel.kernels.kinds import kernel_kind
from costmodel.serving.fit import in_first_half, row_key, shortest
from costmodel.validation.kernels import schema_of
from costmodel.validation.power import _renamed
from costmodel.validation.table import read_table

HEAD = """\
# Idle and activity power by regime, fitted by scripts/fit_power.py; do not edit.
# Shares of the TDP; docstring of costmodel/activity_power.py. held_out_percent: errors on rows no
# fit had seen (both halves of a split by a hash of the shape columns); low, high: factors on the
# power that held 85 % of them.
# Table: {source}
"""
NAMES = (
    "idle_fraction",
    "compute_fraction",
    "compute_exponent",
    "memory_fraction",
    "memory_exponent",
)
START = (0.4, 0.3, 0.4, 0.3, 0.6)
LOW, HIGH = (0.1, 0.0, 0.1, 0.0, 0.1), (0.9, 0.9, 1.5, 0.9, 1.5)
SCATTER = 0.15


def rows_of(path: Path, phase: str) -> dict[str, Any]:
    """Activity and power share of one phase's rows."""
    schema = schema_of("decode_attention")
    keys, shares, compute, memory = [], [], [], []
    for record in read_table(path).records:
        if record["phase"] != phase:
            continue
        renamed = _renamed(record)
        kind, variant, shape = schema.shape_of(renamed)
        device = load_hardware(record["device"])
        work = kernel_kind(kind).work(device, shape, variant)
        seconds = float(record["latency_us"]) * 1e-6
        assert device.tdp_w is not None
        observed = {"latency_us", "power", "energy_mj_per_call", "source"}
        keys.append(row_key({c: v for c, v in record.items() if c not in observed}))
        shares.append(float(record["power"]) / device.tdp_w)
        compute.append(float(np.asarray(work.flops)) / work.peak_flops_per_s / seconds)
        memory.append(float(np.asarray(work.n_bytes)) / device.hbm_bytes_per_s / seconds)
    return {
        "keys": keys,
        "share": np.array(shares),
        "compute": np.array(compute),
        "memory": np.array(memory),
    }


def fit(rows: dict[str, Any], mask: Any) -> PowerParameters:
    """Parameters of the rows a mask selects."""
    from scipy.optimize import least_squares

    def residuals(x: Any) -> Any:
        law = PowerParameters(**dict(zip(NAMES, x.tolist(), strict=True)))
        share = law.share_of_tdp(rows["compute"][mask], rows["memory"][mask])
        prior = 0.05 * (x - np.array(START)) / 0.3
        return np.concatenate([np.log(share / rows["share"][mask]), prior])

    best = least_squares(residuals, START, bounds=(LOW, HIGH), loss="soft_l1", f_scale=SCATTER)
    return PowerParameters(**dict(zip(NAMES, best.x.tolist(), strict=True)))


def judged(rows: dict[str, Any], seed: int) -> Any:
    """Predicted over observed share, each row by a fit of the other half."""
    first = np.array([in_first_half(k, seed) for k in rows["keys"]])
    ratio = np.empty(first.shape)
    for mask in (first, ~first):
        law = fit(rows, mask)
        share = law.share_of_tdp(rows["compute"][~mask], rows["memory"][~mask])
        ratio[~mask] = share / rows["share"][~mask]
    return ratio


def main() -> None:
    """Fit, judge, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source = f"{arguments.table.name}, aiconfigurator-core 0.12.0, Apache-2.0, SHA-256 "
    lines = [HEAD.format(source=source + sha256(arguments.table))]
    lines += [f'fitted = "{datetime.date.today().isoformat()}"', ""]
    for phase in ("decode", "prefill"):
        rows = rows_of(arguments.table, phase)
        law = fit(rows, np.ones(len(rows["keys"]), dtype=bool))
        ratio = np.concatenate([judged(rows, seed) for seed in range(4)])
        error = np.abs(ratio - 1.0) * 100.0
        low, high = shortest(-np.log(ratio), 0.85)
        figures = {
            "n": len(rows["keys"]),
            "mape": round(float(error.mean()), 1),
            "median": round(float(np.median(error)), 1),
            "p90": round(float(np.percentile(error, 90)), 1),
        }
        parameters = {name: round(getattr(law, name), 4) for name in NAMES}
        lines += [
            f"[{phase}]",
            f"parameters = {toml_value(parameters)}",
            f"low = {low:.3f}",
            f"high = {high:.3f}",
            f"held_out_percent = {toml_value(figures)}",
            "",
        ]
        print(phase, parameters, figures)
    arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
