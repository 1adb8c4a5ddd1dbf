"""Validate one table: predict from the shape columns, then read what was observed, then compare."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.errors import ConfigError
from costmodel.hardware import HardwareProfile
from costmodel.validation.kinds import (
    Kind,
    Options,
    check_columns,
    infer_kind,
    kind_named,
)
from costmodel.validation.result import (
    Block,
    Figures,
    Floats,
    Predictions,
    Validation,
    figures,
    joined,
)
from costmodel.validation.table import Record, Table, read_table

#: Times further than this from their prediction, all of them, are in another unit.
UNIT_FACTOR = 100.0
#: Calls longer than this are judged apart: launches no longer decide them.
LARGE_CALL_S = 100e-6
#: A value this far below what the device could do with the stated shape is called impossible: its
#: columns do not describe what ran. Such rows count like any other; figures without them are
#: a part of their own.
LIMIT_TOLERANCE = 0.95

Compared = tuple[Block, Floats]


def validate(
    path: str | Path,
    *,
    kind: str | None = None,
    baseline: str | None = None,
    hardware: HardwareProfile | None = None,
    n_worst: int = 10,
) -> Validation:
    """Predict every row of a table and report the error.

    Parameters
    ----------
    path
        CSV file.
    kind
        Kind of table; inferred from its columns (and ``op``) when None.
    baseline
        "datasheet" judges the datasheet roofline instead of the model.
    hardware
        Profile that replaces the GPU of every row.
    n_worst
        How many of the worst rows to list.

    Raises
    ------
    ConfigError
        The file is no table of that kind, or its values are in another unit.
    """
    if baseline not in (None, "datasheet"):
        raise ConfigError(f"baseline: expected datasheet, got {baseline!r}")
    table = read_table(path)
    chosen = kind_named(kind) if kind else infer_kind(table)
    check_columns(table, chosen)
    options = Options(kind=chosen.name, datasheet=baseline is not None, hardware=hardware)
    predicted = predict_rows(table.records, chosen, options)
    compared, unread = _observed(table, chosen, predicted)
    if not options.datasheet:
        _check_unit(table, compared)
    reasons = Counter(reason for _, reason in (*predicted.unsupported, *unread))
    reasons["more cells than the header has columns"] += len(table.ragged)
    return Validation(
        kind=chosen.name,
        baseline=baseline,
        overall=_figures([c for c in compared if c[0].primary]),
        groups=_groups(compared),
        unsupported=tuple((r, n) for r, n in reasons.most_common() if n),
        worst=_worst(table, compared, n_worst),
        parts=_parts(chosen, compared) | _possible_part(compared),
        assumptions=predicted.assumptions,
    )


def predict_rows(records: Sequence[Record], kind: Kind, options: Options) -> Predictions:
    """Predictions of all rows; observed columns are taken away before the kind's module sees it."""
    hidden = [{c: v for c, v in r.items() if c not in kind.observed} for r in records]
    mine = np.array([kind.takes(r) for r in hidden], dtype=np.bool_)
    out = kind.load().predict([r for r, m in zip(hidden, mine, strict=True) if m], options)
    index = np.flatnonzero(mine)
    blocks = tuple(replace(b, rows=index[b.rows]) for b in out.blocks)
    unsupported = [(int(index[i]), reason) for i, reason in out.unsupported]
    for i in np.flatnonzero(~mine).tolist():
        value = "; ".join(f"{c} = {records[i].get(c, '')[:40]!r}" for c in kind.selects)
        unsupported.append((i, f"row of another kind than {kind.name}: {value}"))
    return Predictions(blocks=blocks, unsupported=tuple(unsupported), assumptions=out.assumptions)


def _observed(
    table: Table, kind: Kind, predicted: Predictions
) -> tuple[list[Compared], list[tuple[int, str]]]:
    """Observed values of every block; rows whose value cannot be read are left out with why."""
    module = kind.load()
    compared: list[Compared] = []
    unread: list[tuple[int, str]] = []
    for block in predicted.blocks:
        values = np.full(block.rows.size, np.nan)
        for i, row in enumerate(block.rows):
            try:
                values[i] = module.observed(table.records[row], block)
            except ConfigError as error:
                unread.append((int(row), str(error)))
        keep = np.isfinite(values)
        compared.append((block.where(keep), values[keep]))
    return compared, unread


def _check_unit(table: Table, compared: Sequence[Compared]) -> None:
    ratios = [o / b.mid for b, o in compared if b.primary and b.unit == "s"]
    if not sum(r.size for r in ratios):
        return
    ratio = float(np.median(np.concatenate(ratios)))
    if not 1.0 / UNIT_FACTOR < ratio < UNIT_FACTOR:
        raise ConfigError(
            f"{table.path}: observed values are {ratio:.3g} times what was predicted (median over "
            "rows); expected the unit that the column's name says (microseconds in latency_us)"
        )


def _figures(compared: Sequence[Compared]) -> Figures:
    return figures(*joined([(b.low, b.mid, b.high, o) for b, o in compared]))


def _groups(
    compared: Sequence[Compared],
) -> tuple[tuple[Mapping[str, str], Figures, str], ...]:
    by_group: dict[tuple[tuple[str, str], ...], list[Compared]] = {}
    for block, observed in compared:
        by_group.setdefault(tuple(block.group.items()), []).append((block, observed))
    out = []
    for group, members in by_group.items():
        if sum(o.size for _, o in members):
            bases = sorted({b.basis for b, _ in members})
            out.append((dict(group), _figures(members), "+".join(bases)))
    return tuple(out)


def _possible_part(compared: Sequence[Compared]) -> dict[str, Figures]:
    """Overall figures of the rows that the device could have run as stated, where some are not."""
    kept: list[Compared] = []
    n_impossible = 0
    for block, observed in compared:
        if not block.primary:
            continue
        possible = np.ones(observed.shape, dtype=np.bool_)
        if block.limit is not None:
            possible = observed >= LIMIT_TOLERANCE * block.limit
        kept.append((block.where(possible), observed[possible]))
        n_impossible += int(np.count_nonzero(~possible))
    return {"without_impossible_rows": _figures(kept)} if n_impossible else {}


def _parts(kind: Kind, compared: Sequence[Compared]) -> dict[str, Figures]:
    """Figures of the parts of a table that are judged apart."""
    by_name: dict[str, list[Compared]] = {}
    for block, observed in compared:
        for name in block.parts:
            by_name.setdefault(name, []).append((block, observed))
    parts = {name: _figures(members) for name, members in sorted(by_name.items())}
    if kind.module == "kernels":
        large = [(b.where(o > LARGE_CALL_S), o[o > LARGE_CALL_S]) for b, o in compared]
        parts["over_100_us"] = _figures(large)
    return parts


def _worst(table: Table, compared: Sequence[Compared], n: int) -> tuple[Mapping[str, Any], ...]:
    rows = [
        (abs(float(m / o - 1.0)), block, int(row), float(lo), float(m), float(hi), float(o))
        for block, observed in compared
        if block.primary
        for row, lo, m, hi, o in zip(
            block.rows, block.low, block.mid, block.high, observed, strict=True
        )
    ]
    rows.sort(key=lambda r: (-r[0], r[2]))
    return tuple(
        {
            "line": table.lines[row],
            "row": _shortened(table.records[row]),
            "group": dict(block.group),
            "unit": block.unit,
            "observed": o,
            "predicted": m,
            "low": lo if np.isfinite(lo) else None,
            "high": hi if np.isfinite(hi) else None,
            "error_percent": (m / o - 1.0) * 100.0,
        }
        for _, block, row, lo, m, hi, o in rows[:n]
    )


def _shortened(record: Record) -> dict[str, str]:
    return {c[:60]: v[:120] for c, v in record.items() if v and c not in ("source", "note")}
