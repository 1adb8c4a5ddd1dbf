"""A validation as text: figures by group, what was left out, the worst rows."""

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from costmodel.units import format_bytes, format_seconds
from costmodel.validation import Validation
from costmodel.validation.result import Figures
from lccost.show import console

_COLUMNS = ("n", "MAPE %", "median %", "p90 %", "bias %", "inside %", "width %")
#: Worst rows shown in the text form; JSON lists as many as were asked for.
_SHOWN_WORST = 5


def as_text(validation: Validation) -> str:
    """The report of ``lccost validate``."""
    file = io.StringIO()
    out = console(file)
    what = "datasheet roofline" if validation.baseline else "lccost"
    out.print(f"{validation.kind}: {what} against what was observed")
    table = _table("group")
    table.add_row("all", *_cells(validation.overall), "")
    for name, figures in validation.parts.items():
        table.add_row(name.replace("_", " "), *_cells(figures), "")
    for group, figures, basis in validation.groups:
        table.add_row(" ".join(v for v in group.values() if v), *_cells(figures), basis)
    out.print(table)
    if validation.unsupported:
        n = sum(count for _, count in validation.unsupported)
        out.print(f"{n} rows or values cannot be modelled:")
        for reason, count in validation.unsupported:
            out.print(f"  {count:5} {reason}")
    for row in validation.worst[:_SHOWN_WORST]:
        out.print(_worst(row))
    for line in validation.assumptions:
        out.print(f"- {line}")
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("basis")
    return table


def _cells(figures: Figures) -> list[str]:
    values = (
        figures.mape_percent,
        figures.median_percent,
        figures.p90_percent,
        figures.bias_percent,
        figures.coverage_percent,
        figures.interval_width_percent,
    )
    return [str(figures.n), *("" if v is None else f"{v:.1f}" for v in values)]


def _worst(row: Mapping[str, Any]) -> str:
    def shown(value: float) -> str:
        return (
            format_seconds(value)
            if row["unit"] == "s"
            else (format_bytes(value) if row["unit"] == "bytes" else f"{value:.4g} {row['unit']}")
        )

    return (
        f"line {row['line']}: observed {shown(row['observed'])}, predicted "
        f"{shown(row['predicted'])} ({row['error_percent']:+.0f} %) · "
        + " ".join(f"{k}={v}" for k, v in row["row"].items())
    )
