"""Tables as data, and their renderings: terminal, Markdown, CSV, JSON.

A :class:`Table` holds raw values beside the text people read; every rendering is a pure function of
it. rich is imported only when a terminal table is asked for.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reports.comparison import Comparison, ErrorGroup, error_groups, parse_fields
from reports.labels import METRIC_TITLES, metric_value, percent, safe_text, tokens

if TYPE_CHECKING:
    from rich.table import Table as RichTable

SIGN_NOTE = (
    "Error = (predicted - observed) / observed; MAPE, median and p90 are of its size, "
    "bias is the median signed error."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: JSON and CSV name, heading, and whether it is a number."""

    name: str
    title: str
    is_number: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Values (for machines) and texts (for people) of the same cells."""

    title: str
    columns: tuple[Column, ...]
    values: tuple[tuple[Any, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def without(self, *names: str) -> "Table":
        """The table less some columns."""
        kept = [n for n, c in enumerate(self.columns) if c.name not in names]
        return replace(
            self,
            columns=tuple(self.columns[n] for n in kept),
            values=tuple(tuple(row[n] for n in kept) for row in self.values),
            texts=tuple(tuple(row[n] for n in kept) for row in self.texts),
        )

    def dicts(self) -> list[dict[str, Any]]:
        """Rows as JSON objects; an unknown or infinite number is null."""
        names = [c.name for c in self.columns]
        return [dict(zip(names, map(_finite, row), strict=True)) for row in self.values]


def error_table(
    comparison: Comparison, by: str | Sequence[str] = ("method",), *, exact_rows: bool = True
) -> Table:
    """Error by group, metric and basis (see :class:`~reports.comparison.ErrorGroup`).

    Without ``exact_rows`` a metric that is exact in every group is a note instead of rows.
    """
    fields = parse_fields(by)
    groups = error_groups(comparison, fields)
    notes = [SIGN_NOTE, *_basis_notes(groups)]
    if not exact_rows:
        inexact = {g.metric for g in groups if g.worst_percent != 0}
        exact = dict.fromkeys(METRIC_TITLES[g.metric] for g in groups if g.metric not in inexact)
        groups = tuple(g for g in groups if g.metric in inexact)
        if exact:
            notes.insert(0, f"Exact in every record: {', '.join(exact)}.")
    columns = (
        *(Column(name=f, title=_FIELD_TITLES.get(f, f.replace("_", " "))) for f in fields),
        Column(name="metric", title="metric"),
        Column(name="basis", title="basis"),
        Column(name="n", title="n", is_number=True),
        Column(name="n_noisy", title="noisy", is_number=True),
        Column(name="mape_percent", title="MAPE", is_number=True),
        Column(name="median_percent", title="median", is_number=True),
        Column(name="p90_percent", title="p90", is_number=True),
        Column(name="bias_percent", title="bias", is_number=True),
        Column(name="worst_percent", title="worst", is_number=True),
        Column(name="worst_point", title="worst at"),
        Column(name="worst_origin", title="record"),
    )
    return Table(
        title="Prediction error",
        columns=columns,
        values=tuple(_group_values(g, fields) for g in groups),
        texts=tuple(_group_texts(g, fields) for g in groups),
        notes=tuple(notes),
    )


def point_table(comparison: Comparison) -> Table:
    """Every joined metric of every pair: predicted, observed, error."""
    values, texts = [], []
    for e in comparison.errors:
        key = e.pair.key
        fields = (key.method_spec, key.text("level"), key.text("model"), key.text("gpu"))
        context, batch = key.number("context_tokens"), key.number("batch")
        error = e.error * 100.0
        values.append(
            (
                *(*fields, context, batch, e.metric, e.predicted, e.observed, error),
                *(e.pair.basis, key.status, key.origin),
            )
        )
        texts.append(
            (
                *(*(safe_text(f, 48) for f in fields), tokens(context), tokens(batch)),
                *(METRIC_TITLES[e.metric], metric_value(e.metric, e.predicted)),
                *(metric_value(e.metric, e.observed), percent(error, signed=True)),
                *(e.pair.basis, "noisy" if e.pair.is_noisy else key.status),
                _short_origin(key.origin),
            )
        )
    return Table(
        title="Predicted beside observed",
        columns=_POINT_COLUMNS,
        values=tuple(values),
        texts=tuple(texts),
        notes=(SIGN_NOTE.split(";")[0] + ".",),
    )


def unjoined_table(comparison: Comparison) -> Table:
    """Records that take no part, with the reason."""
    rows = tuple((u.origin, u.label, u.reason) for u in comparison.unjoined)
    return Table(
        title="Not compared",
        columns=(
            Column(name="record", title="record"),
            Column(name="point", title="point"),
            Column(name="reason", title="why"),
        ),
        values=rows,
        texts=tuple(tuple(safe_text(cell, 160) for cell in row) for row in rows),
    )


def render(table: Table, form: str) -> str:
    """The table as text: ``md``, ``csv``, ``json``, ``jsonl`` or ``table`` (plain columns)."""
    renderers = {
        "md": to_markdown,
        "csv": to_csv,
        "json": lambda t: json.dumps(t.dicts(), indent=2, ensure_ascii=False) + "\n",
        "jsonl": lambda t: "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in t.dicts()),
        "table": to_plain,
    }
    return renderers[form](table)


def to_markdown(table: Table) -> str:
    """A GitHub table with a heading and notes; names cannot break out of their cell."""
    lines = [f"### {markdown_text(table.title)}", ""]
    lines.append("| " + " | ".join(c.title for c in table.columns) + " |")
    lines.append("|" + "|".join("---:" if c.is_number else "---" for c in table.columns) + "|")
    lines += ["| " + " | ".join(markdown_text(t) for t in row) + " |" for row in table.texts]
    lines += ["", *(markdown_text(note) + "\n" for note in table.notes)]
    return "\n".join(lines).rstrip("\n") + "\n"


def to_csv(table: Table) -> str:
    """Raw values with the JSON names as header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([c.name for c in table.columns])
    for row in table.values:
        writer.writerow([_csv_cell(v) for v in row])
    return out.getvalue()


def to_plain(table: Table) -> str:
    """Aligned columns without colour, for pipes and logs."""
    cells = [tuple(c.title for c in table.columns), *table.texts]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join([table.title, *lines, *table.notes]) + "\n"


def rich_table(table: Table) -> "RichTable":
    """The table for ``rich.console.Console.print``; markup in names stays text."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=table.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption="\n".join(table.notes) or None,
        caption_justify="left",
    )
    for column in table.columns:
        shown.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for row in table.texts:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\|`*_<>[]":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


_FIELD_TITLES = {"context_tokens": "context", "method_spec": "method", "output_tokens": "output"}
_POINT_COLUMNS = (
    Column(name="method_spec", title="method"),
    Column(name="level", title="level"),
    Column(name="model", title="model"),
    Column(name="gpu", title="device"),
    Column(name="context_tokens", title="context", is_number=True),
    Column(name="batch", title="batch", is_number=True),
    Column(name="metric", title="metric"),
    Column(name="predicted", title="predicted", is_number=True),
    Column(name="observed", title="observed", is_number=True),
    Column(name="error_percent", title="error", is_number=True),
    Column(name="basis", title="basis"),
    Column(name="status", title="status"),
    Column(name="record", title="record"),
)


def _group_values(group: ErrorGroup, fields: Sequence[str]) -> tuple[Any, ...]:
    return (
        *(group.group.get(f) for f in fields),
        *(group.metric, group.basis, group.n, group.n_noisy),
        *(group.mape_percent, group.median_percent, group.p90_percent, group.bias_percent),
        *(group.worst_percent, group.worst_point, group.worst_origin),
    )


def _group_texts(group: ErrorGroup, fields: Sequence[str]) -> tuple[str, ...]:
    noisy = str(group.n_noisy) if group.n_noisy else ""
    head = (
        *(_field_text(f, group.group.get(f)) for f in fields),
        *(METRIC_TITLES[group.metric], safe_text(group.basis, 24), str(group.n), noisy),
    )
    if group.worst_percent == 0:
        # The worst of nothing but exact hits is no news.
        return (*head, "exact", *[""] * 6)
    return (
        *head,
        percent(group.mape_percent),
        *(percent(group.median_percent), percent(group.p90_percent)),
        *(percent(group.bias_percent, signed=True), percent(group.worst_percent, signed=True)),
        *(group.worst_point, _short_origin(group.worst_origin)),
    )


def _short_origin(origin: str) -> str:
    """The file's name and line without its folders."""
    return safe_text(origin.replace("\\", "/").rsplit("/", 1)[-1], 60)


def _field_text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_tokens") and isinstance(value, (int, float)):
        return tokens(float(value))
    return safe_text(str(value), 48)


def _basis_notes(groups: Sequence[ErrorGroup]) -> tuple[str, ...]:
    bases = sorted({g.basis for g in groups})
    if len(bases) < 2:
        return ()
    return (f"Predictions of different basis are kept apart: {', '.join(bases)}.",)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return dict(value)
    return value


def _csv_cell(value: Any) -> Any:
    value = _finite(value)
    if value is None:
        return ""
    if isinstance(value, str):
        value = safe_text(value)
    # A spreadsheet would run a name that starts like a formula.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
