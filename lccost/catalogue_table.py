"""Cells and plain tables of what lccost knows."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from lccost.show import console

#: key of a row -> (title, how its value is shown)
Columns = dict[str, tuple[str, Callable[[Any], str]]]


def text(value: Any) -> str:
    """A cell; a dash for none."""
    return "-" if value is None else str(value)


def joined(value: Sequence[str]) -> str:
    """Names with commas; a dash for none."""
    return ", ".join(value) or "-"


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """A plain table of rows."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, _ in columns.values():
        out.add_column(title, overflow="fold")
    for row in rows:
        out.add_row(*(show(row[key]) for key, (_, show) in columns.items()))
    return render(out)


def render(*parts: Any) -> str:
    """What is printed, as text."""
    file = io.StringIO()
    out = console(file)
    for part in parts:
        out.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def is_summary(task: str) -> bool:
    """Averages and retrieval tests; single tasks of a benchmark are in the JSON form."""
    return any(word in task.lower() for word in ("average", "needle", "passkey", "ruler"))
