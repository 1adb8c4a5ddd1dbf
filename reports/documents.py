"""A report as a file: the ending says which.

.html  the interactive page        .md    verdict and tables, for pull requests
.pdf   the static figures          .csv   the ranked table, raw values
.xlsx  data and live cost formulas .json  everything, for scripts

The same records give the same bytes in every form; a date is written only where
``SOURCE_DATE_EPOCH`` gives one.
"""

import io
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from costmodel.errors import ConfigError
from costmodel.files import write_atomic
from reports.excel import to_xlsx
from reports.figures.style import GREY, WIDE, house_style, new_figure, source_date
from reports.html import to_html
from reports.illustrations import illustrations
from reports.report import Report
from reports.tables import Table, markdown_text, to_csv, to_markdown

#: What stands in the envelope of every JSON document.
SCHEMA_VERSION = "1"
#: Endings that a report can have.
ENDINGS = (".html", ".md", ".pdf", ".csv", ".xlsx", ".json")


def write_report(report: Report, path: str | Path, *, version: str = "") -> Path:
    """Write a report in the form that the ending names; raises ``ConfigError`` for others."""
    path = Path(path)
    renderers: Mapping[str, Callable[[], str | bytes]] = {
        ".html": lambda: to_html(report, version=version),
        ".md": lambda: to_markdown_report(report),
        ".pdf": lambda: to_pdf(report),
        ".csv": lambda: to_csv(report.ranking),
        ".xlsx": lambda: to_xlsx(report),
        ".json": lambda: to_json(report, version=version),
    }
    render = renderers.get(path.suffix.lower())
    if render is None:
        raise ConfigError(
            f"{path}: expected an ending of {', '.join(ENDINGS)}, got {path.suffix or 'none'!r}"
        )
    return write_atomic(path, render())


def tables_of(report: Report) -> tuple[Table, ...]:
    """All tables of a report, in order; empty ones are left out."""
    every = (
        *(report.ranking, report.errors, report.validation, report.break_even),
        report.sensitivity,
        *(report.accuracy, report.provenance, report.left_out, report.reproduce),
    )
    return tuple(t for t in every if t.texts)


def to_markdown_report(report: Report) -> str:
    """Verdict, remarks, tables and assumptions."""
    lines = [f"# {markdown_text(report.title)}", "", f"**{markdown_text(report.verdict)}**", ""]
    lines += [f"- {markdown_text(remark)}" for remark in report.remarks]
    parts = ["\n".join(lines).rstrip() + "\n", *map(to_markdown, tables_of(report))]
    if report.assumptions:
        listed = "\n".join(f"- {markdown_text(a)}" for a in report.assumptions)
        parts.append(f"### Assumptions\n\n{listed}\n")
    return "\n".join(parts)


def to_json(report: Report, *, version: str = "") -> str:
    """The report as one document: results are the ranked rows."""
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "lccost_version": version,
        "command": "report",
        "inputs": {"title": report.title},
        "assumptions": list(report.assumptions),
        "results": report.ranking.dicts(),
        "verdict": report.verdict,
        "remarks": list(report.remarks),
        "errors": report.errors.dicts(),
        "validation": report.validation.dicts(),
        "break_even": report.break_even.dicts(),
        "sensitivity": report.sensitivity.dicts(),
        "accuracy": report.accuracy.dicts(),
        "provenance": report.provenance.dicts(),
        "left_out": report.left_out.dicts(),
        "reproduce": report.reproduce.dicts(),
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_pdf(report: Report) -> bytes:
    """A page with the verdict, then one page a figure."""
    with house_style():
        from matplotlib.backends.backend_pdf import PdfPages

        out = io.BytesIO()
        metadata = {
            "Title": report.title,
            "Creator": "lccost",
            "Producer": None,
            "CreationDate": source_date(),
        }
        with PdfPages(out, metadata=metadata) as pages:
            pages.savefig(_first_page(report))
            for made in illustrations(report):
                pages.savefig(made.make())
        return out.getvalue()


def _first_page(report: Report) -> Any:
    figure, axes = new_figure(WIDE)
    axes.set_axis_off()
    lines = [
        *textwrap.wrap(report.verdict, 100),
        "",
        *(line for remark in report.remarks for line in textwrap.wrap(f"- {remark}", 110)),
        "",
        *(line for text in report.assumptions for line in textwrap.wrap(f"- {text}", 110)),
    ]
    axes.set_title("\n".join(textwrap.wrap(report.title, 70)))
    axes.text(0.0, 0.97, "\n".join(lines[:34]), va="top", transform=axes.transAxes, linespacing=1.4)
    if len(lines) > 34:
        axes.text(0.0, 0.0, "... (more in the page)", color=GREY, transform=axes.transAxes)
    return figure
