"""A table of measured kernels into one profile of the device they ran on.

The profile holds everything of the base device and, per kernel family of the table, a section
``[families."<kind>/<variant>/<engine>/<kernel>"]``: parameters with their meaning, number of rows,
range of shapes, error and interval on rows that the judging fits had not seen. ``--gpu`` accepts it
wherever it accepts a GPU. Its families go before those that ship, but for kernels they are not of.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from costmodel.calibration.families import Fitted, errors_percent, fit_families
from costmodel.calibration.intervals import shortest
from costmodel.calibration.tables import FamilyKey, Rejected, Rows, Table, read_table
from costmodel.calibration.write import sha256, toml_value
from costmodel.errors import ConfigError
from costmodel.hardware import HardwareProfile
from costmodel.kernels.families import ENDS
from costmodel.kernels.kinds import kernel_kind
from costmodel.prices import bundled_prices

#: Rows left out that are named one by one.
SHOWN_ROWS = 1000
#: Rows a family needs: fewer say less than the beliefs they would replace.
LEAST_ROWS = 12
#: Different shapes among them: repeats of one call say nothing of another.
LEAST_SHAPES = 3
#: Rows of a family that are read at most, a seeded choice: a handful of parameters need no more,
#: and fits to many more take minutes.
MOST_ROWS = 2_000
#: Seeded splits that judge a family.
JUDGING_SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """One family as it was written: key, rows, errors in percent on unseen rows."""

    key: FamilyKey
    n_rows: int
    held_out: dict[str, float]
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A profile's text, its families, rows left out, families with too few rows, and good rows that
    were not read since a family had enough.
    """

    text: str
    families: tuple[Calibrated, ...]
    rejected: tuple[Rejected, ...]
    too_few: tuple[Rows, ...]
    n_unread: int


def calibrate_table(
    path: Path, base: HardwareProfile, *, kind: str | None = None, n_starts: int = 3
) -> Calibration:
    """Fit every family of a table on the device ``base``.

    Raises ``ConfigError`` where the file is no table of kernels of that device, or no family is
    left with ``LEAST_ROWS`` good rows of ``LEAST_SHAPES``. Bad rows are in the result, each with
    its line and reason.
    """
    if base.is_cpu or not base.n_units:
        raise ConfigError(
            f"{base.name}: kernel families are of GPUs with known n_units; calibrate a CPU on "
            "itself: lccost calibrate --device cpu"
        )
    table = read_table(path, kind=kind, profile=base)
    enough = [rows for rows in table.families if _suffice(rows)]
    too_few = tuple(rows for rows in table.families if not _suffice(rows))
    if not enough:
        raise ConfigError(_nothing_left(path, table, base))
    by_kind: dict[str, list[Rows]] = {}
    for rows in enough:
        by_kind.setdefault(rows.key.kind, []).append(_at_most(rows, MOST_ROWS))
    fitted = [
        f
        for families in by_kind.values()
        for f in fit_families(families, {base.name: base}, seeds=JUDGING_SEEDS, starts=n_starts)
    ]
    calibrated = tuple(_judged(f) for f in fitted)
    text = _document(base, path, table, fitted, calibrated)
    n_unread = sum(map(len, enough)) - sum(c.n_rows for c in calibrated)
    return Calibration(text, calibrated, table.rejected, too_few, n_unread)


def _at_most(rows: Rows, n: int) -> Rows:
    """All rows, or a seeded choice of ``n``."""
    if len(rows) <= n:
        return rows
    mask = np.zeros(len(rows), dtype=np.bool_)
    mask[np.random.default_rng(0).permutation(len(rows))[:n]] = True
    return rows.where(mask)


def _suffice(rows: Rows) -> bool:
    return len(rows) >= LEAST_ROWS and rows.n_shapes() >= LEAST_SHAPES


def _nothing_left(path: Path, table: Table, base: HardwareProfile) -> str:
    found = "none"
    if table.families:
        most = max(table.families, key=len)
        found = f"at most {len(most)} of {most.n_shapes()} shapes"
    n = len(table.rejected)
    head = (
        f"{path}: expected at least {LEAST_ROWS} good rows of one kernel family on {base.name}, "
        f"of at least {LEAST_SHAPES} shapes; found {found} ({n:,} left out)"
    )
    return "\n".join([head, *left_out(path, table.rejected)])


def left_out(path: Path, rejected: Sequence[Rejected]) -> list[str]:
    """A line for every row that was left out, and why."""
    lines = [f"{path}:{row.line}: left out: {row.reason}" for row in rejected[:SHOWN_ROWS]]
    if len(rejected) > SHOWN_ROWS:
        lines.append(f"... and {len(rejected) - SHOWN_ROWS:,} more rows left out")
    return lines


def _judged(fitted: Fitted) -> Calibrated:
    observed = np.broadcast_to(fitted.rows.observed_s, fitted.held_out_s.shape)
    low, high = shortest(np.log(observed / fitted.held_out_s))
    return Calibrated(
        fitted.key,
        len(fitted.rows),
        errors_percent(fitted.held_out_s, observed),
        low,
        high,
    )


def _document(
    base: HardwareProfile,
    path: Path,
    table: Table,
    fitted: Sequence[Fitted],
    calibrated: Sequence[Calibrated],
) -> str:
    today = datetime.date.today().isoformat()
    facts = {
        "date": today,
        "table": f"{path.name}, SHA-256 {sha256(path)}",
        "source": table.source or "not stated in the table",
        "method": "lccost calibrate --table: robust fit on the logarithm of times; errors of rows "
        f"that no fit had seen, both halves of {len(JUDGING_SEEDS)} seeded splits",
        "rows": str(sum(c.n_rows for c in calibrated)),
        "rows_left_out": str(len(table.rejected)),
    }
    lines = [
        f"# {base.title}, calibrated {today} by `lccost calibrate --table` from {path.name!r}.",
        "# Times in seconds, rates in bytes/s, shares of datasheet rates without a unit.",
        "",
        *(f"{key} = {toml_value(value)}" for key, value in device_fields(base).items()),
    ]
    sections: dict[str, dict[str, Any]] = {
        "peak_flops_per_s": dict(base.peak_flops_per_s),
        "sources": dict(base.sources),
        "confidence": dict(base.confidence),
        "calibration": facts,
    }
    for curve, values in base.curves.items():
        row = {"x": list(values.x), "y": list(values.y), "spread": values.spread}
        sections[f"curves.{toml_value(curve)}"] = row
    written = {_section(f.key) for f in fitted}
    for name, numbers in base.families.items():
        if name not in written:
            sections[f"families.{toml_value(name)}"] = dict(numbers)
    for name, section in sections.items():
        lines += ["", f"[{name}]", *(f"{_key(k)} = {toml_value(v)}" for k, v in section.items())]
    for f, c in zip(fitted, calibrated, strict=True):
        lines += ["", *_family(f, c)]
    return "\n".join(lines) + "\n"


def device_fields(base: HardwareProfile) -> dict[str, Any]:
    """Plain fields of a profile; its price only where the dated price file has none."""
    names = (
        *("name", "title", "vendor", "generation", "n_units", "hbm_bytes_per_s", "memory_bytes"),
        *("memory_marketing_bytes", "l2_bytes", "clock_hz", "tdp_w", "link_bytes_per_s"),
        *("host_link_bytes_per_s", "max_gpus_per_node"),
    )
    out = {name: getattr(base, name) for name in names}
    if base.price_usd_per_hour and base.name not in bundled_prices():
        out |= {
            "price_usd_per_hour": list(base.price_usd_per_hour),
            "price_date": base.price_date,
            "price_source": base.price_source,
        }
    if base.notes:
        out["notes"] = list(base.notes)
    return {k: v for k, v in out.items() if v is not None}


def _section(key: FamilyKey) -> str:
    return f"{key.kind}/{key.variant}/{key.engine}/{key.kernel}"


def _family(fitted: Fitted, calibrated: Calibrated) -> list[str]:
    """One family's section: parameters with their meaning, then what is known about them."""
    key = fitted.key
    priors = kernel_kind(key.kind).priors(key.kernel, key.variant)
    lines = [f"[families.{toml_value(_section(key))}]"]
    for name, value in fitted.parameters.items():
        meaning = f"  # {priors[name].meaning}" if name in priors else ""
        lines.append(f"{name} = {toml_value(_rounded(value))}{meaning}")
    lines.append(f"n_rows = {calibrated.n_rows}")
    for name, column in fitted.rows.shape.items():
        for end, value in zip(ENDS, (column.min(), column.max()), strict=True):
            lines.append(f"{end}{name} = {toml_value(float(value))}")
    for name, value in calibrated.held_out.items():
        lines.append(f"held_out_{name} = {toml_value(round(value, 2))}  # percent, unseen rows")
    lines.append(f"interval_low = {toml_value(_rounded(calibrated.low))}")
    lines.append(f"interval_high = {toml_value(_rounded(calibrated.high))}")
    return lines


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() and name.isascii() else toml_value(name)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
