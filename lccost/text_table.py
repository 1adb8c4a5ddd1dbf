"""A table as plain text: what ``predict`` prints, without the time that importing and laying out
rich takes. Other commands, which print once for minutes of work, use rich.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

_GAP = "   "
#: No column is folded narrower than this.
_NARROWEST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A title and where its cells stand. ``folds``: it gives way when the table is too wide."""

    title: str
    is_number: bool = False
    folds: bool = False


def markdown(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; lines within a cell are joined by blanks."""
    lines = [[" ".join(c.title.split("\n")) for c in columns]]
    lines += [[" ".join(cell.split("\n")).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    rule = (
        "|"
        + "|".join(
            "-" * (w + 1) + ("-:"[c.is_number]) for w, c in zip(widths, columns, strict=True)
        )
        + "|"
    )
    shown = ["| " + " | ".join(_placed(line, columns, widths)) + " |" for line in lines]
    return "\n".join([shown[0], rule, *shown[1:]]) + "\n"


def plain(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table under a rule, titles at the bottom of their lines, cells at the top of theirs.

    Where it is wider than ``width``, columns that fold share what is too much.
    """
    cells = [[cell.split("\n") for cell in row] for row in rows]
    titles = [c.title.split("\n") for c in columns]
    every = [titles, *cells]
    widths = [max(len(part) for row in every for part in row[i]) for i in range(len(columns))]
    excess = sum(widths) + len(_GAP) * (len(columns) - 1) - width
    for i, column in enumerate(columns):
        if column.folds and excess > 0:
            narrow = max(_NARROWEST, widths[i] - excess)
            excess -= widths[i] - narrow
            widths[i] = narrow
            for row in every:
                row[i] = [piece for part in row[i] for piece in _folded(part, narrow)]
    tallest = max(len(t) for t in titles)
    head = [[""] * (tallest - len(t)) + t for t in titles]
    lines = _lines(head, columns, widths)
    lines.append("─" * (sum(widths) + len(_GAP) * (len(columns) - 1)))
    for row in cells:
        lines += _lines(row, columns, widths)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _lines(
    row: Sequence[Sequence[str]], columns: Sequence[Column], widths: Sequence[int]
) -> list[str]:
    return [
        _GAP.join(_placed([c[n] if n < len(c) else "" for c in row], columns, widths))
        for n in range(max(len(c) for c in row))
    ]


def _placed(line: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    return [
        text.rjust(w) if c.is_number else text.ljust(w)
        for text, c, w in zip(line, columns, widths, strict=True)
    ]
