"""Tables as data, and their renderings: terminal, Markdown, CSV, JSON.

A :class:`Table` holds raw values beside the text people read; every rendering is a pure function of
it. rich is imported only when a terminal table is asked for.
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reports.labels import safe_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable


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
