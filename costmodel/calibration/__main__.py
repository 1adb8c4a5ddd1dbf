"""Fit the families that ship: ``python -m costmodel.calibration --data DIR --output DIR``.

Reads every kernel table in a folder, fits and judges all its families, writes one JSON file per
kind, and prints what was reached on unseen rows. Takes some minutes on one core.
"""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.calibration.families import (
    JUDGING_SEEDS,
    LEAST_ROWS,
    Fitted,
    as_tables,
    errors_percent,
    fit_families,
)
from costmodel.calibration.tables import Rows, read_table
from costmodel.calibration.transfer import generation_spread
from costmodel.calibration.write import document, sha256
from costmodel.kernels.families import family_from_table

#: Only these tables hold one kernel call per row.
TABLES = (
    "gemm.csv",
    "decode_attention.csv",
    "prefill_attention.csv",
    "mla.csv",
    "linear_attention.csv",
    "sparse_attention.csv",
    "moe.csv",
    "collectives.csv",
)


def main() -> None:
    """Fit, judge, write, print."""
    parser = argparse.ArgumentParser(prog="python -m costmodel.calibration", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the kernel tables")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--kind", action="append", help="only this kind (repeat)")
    arguments = parser.parse_args()
    for name in TABLES:
        path = arguments.data / name
        if path.is_file():
            fit_table(path, arguments.output, arguments.kind)


def fit_table(path: Path, output: Path, kinds: Sequence[str] | None) -> None:
    """Fit all families of one table and write a file per kind."""
    table = read_table(path)
    by_kind: dict[str, list[Rows]] = {}
    for rows in table.families:
        if len(rows) >= LEAST_ROWS:
            by_kind.setdefault(rows.key.kind, []).append(rows)
    for kind, families in sorted(by_kind.items()):
        if kinds and kind not in kinds:
            continue
        fitted = fit_families(families)
        tables = as_tables(fitted, f"{table.source}: {path.name}")
        spread = generation_spread([family_from_table(kind, t) for t in tables], families)
        for row in tables:
            row["generation_spread"] = round(spread, 2)
        text = document(
            kind,
            tables,
            fitted=datetime.date.today().isoformat(),
            source=f"{path.name}, {table.source}, Apache-2.0, SHA-256 {sha256(path)}",
            n_rejected=len(table.rejected),
            n_splits=len(JUDGING_SEEDS),
        )
        (output / f"{kind}.json").write_text(text, encoding="utf-8")
        print(summary(kind, fitted, tables), flush=True)


def summary(kind: str, fitted: Sequence[Fitted], tables: Sequence[dict[str, Any]]) -> str:
    """One line per family and one for the kind: datasheet roofline beside ours, unseen rows."""
    lines = []
    for f, table in zip(fitted, tables, strict=True):
        t = table["held_out_percent"]
        lines.append(
            f"{kind:22} {f.key.hardware:14} {f.key.engine:8} {f.key.kernel[:38]:38} "
            f"{f.key.variant:12} n {len(f.rows):4}  roofline {t['roofline_mape']:5.1f}/"
            f"{t['roofline_median']:5.1f}/{t['roofline_p90']:5.1f}  ours {t['mape']:5.1f}/"
            f"{t['median']:5.1f}/{t['p90']:5.1f}  covered {t['coverage']:3.0f} %, "
            f"width {t['interval_width'] / t['mape']:.1f} x MAPE"
        )
    predicted = np.concatenate([f.held_out_s for f in fitted], axis=1)
    observed = np.concatenate([f.rows.observed_s for f in fitted])
    roofline = errors_percent(np.concatenate([f.roofline_s for f in fitted]), observed)
    ours = errors_percent(predicted, np.broadcast_to(observed, predicted.shape))
    large = observed > 1e-4
    big = errors_percent(
        predicted[:, large], np.broadcast_to(observed[large], predicted[:, large].shape)
    )
    lines.append(
        f"{kind:22} ALL n {len(observed)}  roofline {roofline['mape']:.1f}/"
        f"{roofline['median']:.1f}/{roofline['p90']:.1f}  ours {ours['mape']:.1f}/"
        f"{ours['median']:.1f}/{ours['p90']:.1f}, over 100 us {big['mape']:.1f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
