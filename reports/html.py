"""One self-contained page: opens from disk, asks no network, same bytes for the same records.

Styles, scripts, figures and the charting library (``vendor/``) are inlined; a content security
policy lets only these very scripts run (by hash) and forbids every request. Everything that comes
from records is escaped text, in the markup and in the data block alike.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from costmodel.errors import MissingExtraError
from reports.figures import NARROW, WIDE
from reports.figures.encode import small_png
from reports.illustrations import Illustration, has_one_context, illustrations
from reports.page_data import chart_specs
from reports.report import Report
from reports.tables import Table

#: Rows of the ranked table without JavaScript; with it the table turns pages.
MOST_STATIC_ROWS = 200
_STYLES = ("vendor/uPlot.min.css", "templates/report.css")
_SCRIPTS = ("vendor/uPlot.iife.min.js", "templates/report.js")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A PNG inside the page."""

    source: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A static figure; ``chart`` is the id of the interactive twin that replaces it.

    ``narrow`` is the form for phones, which only figures without a twin need.
    """

    title: str
    alt: str
    image: Image
    narrow: Image | None
    chart: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the page: text, figures, tables, list, in this order."""

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    items: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing below the heading."""
        has_rows = any(t.texts for t in self.tables)
        return not (self.paragraphs or self.figures or self.items or has_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What stands on top of a page."""

    title: str
    verdict: str
    remarks: tuple[str, ...]


def to_html(report: Report, *, version: str = "", memory_fraction: float = 0.9) -> str:
    """Render the page."""
    specs = chart_specs(report, memory_fraction)
    pictures = [(i.section, picture_of(i, specs)) for i in illustrations(report)]
    heading = Heading(title=report.title, verdict=report.verdict, remarks=report.remarks)
    return page(heading, sections_of(report, pictures), specs, report.ranking, version=version)


def page(
    heading: Heading,
    sections: Sequence[Section],
    specs: dict[str, Any],
    ranking: Table,
    *,
    version: str = "",
) -> str:
    """Render a page: ``ranking`` is the table of section "methods", ``specs`` the charts by id."""
    environment, markup = _jinja()
    styles = [_asset(name) for name in _STYLES]
    scripts = [_asset(name) for name in _SCRIPTS]
    text: str = environment.get_template("report.html.j2").render(
        report=heading,
        version=version,
        policy=_policy(styles, scripts),
        styles=[markup(s) for s in styles],
        scripts=[markup(s) for s in scripts],
        sections=sections,
        data=markup(json_in_html({"charts": specs, "table": _table_data(ranking)})),
        most_rows=MOST_STATIC_ROWS,
    )
    return text


def sections_of(
    report: Report, pictures: Sequence[tuple[str, Picture]] = ()
) -> tuple[Section, ...]:
    """Sections in the order of a report; those with nothing to say are left out."""

    def of(section: str) -> tuple[Picture, ...]:
        return tuple(picture for name, picture in pictures if name == section)

    found = (
        Section(id="methods", title="Methods", tables=(report.ranking,)),
        Section(id="roofline", title="Roofline", figures=of("roofline")),
        Section(
            id="error",
            title="Prediction error",
            figures=of("error"),
            tables=(report.errors, report.validation),
        ),
        Section(id="memory", title="Memory", figures=of("memory")),
        Section(
            id="curves",
            title="Side by side" if has_one_context(report.pairs) else "Against context",
            figures=of("curves"),
        ),
        Section(id="breakdown", title="Where a step spends its time", figures=of("breakdown")),
        Section(id="break-even", title="Break-even", tables=(report.break_even,)),
        Section(id="sensitivity", title="Sensitivity", tables=(report.sensitivity,)),
        Section(
            id="accuracy",
            title="Accuracy evidence",
            figures=of("accuracy"),
            tables=(report.accuracy,),
        ),
        Section(
            id="assumptions",
            title="Assumptions and provenance",
            tables=(report.provenance, report.left_out),
            items=report.assumptions,
        ),
        Section(id="reproduce", title="How to reproduce", tables=(report.reproduce,)),
    )
    head = Section(id="verdict", title="Verdict", paragraphs=())
    return (head, *(s for s in found if not s.is_empty))


def json_in_html(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def picture_of(made: Illustration, specs: dict[str, Any]) -> Picture:
    """Its static form, and the id of its interactive twin where there is one."""
    chart = made.chart if made.chart in specs else ""
    return Picture(
        title=made.title,
        alt=f"Figure: {made.title}. The tables on this page have the numbers.",
        image=_image(made, WIDE),
        narrow=None if chart else _image(made, NARROW),
        chart=chart,
    )


def _image(made: Illustration, size: tuple[float, float]) -> Image:
    data, width, height = small_png(made.make(size=size))
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Image(source=source, width=width, height=height)


def _table_data(table: Table) -> dict[str, Any]:
    columns = [{"name": c.name, "title": c.title, "is_number": c.is_number} for c in table.columns]
    values = [
        [_sortable(v) if c.is_number else None for v, c in zip(row, table.columns, strict=True)]
        for row in table.values
    ]
    return {"columns": columns, "values": values, "texts": table.texts}


def _sortable(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.7g}")


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Nothing but these scripts and styles, and images inside the page."""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src " + " ".join(map(_hash, scripts)),
            "style-src " + " ".join(map(_hash, styles)),
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _asset(name: str) -> str:
    text = (resources.files("reports") / name).read_text(encoding="utf-8")
    # Hashes are of what stands between the tags: keep them free of line-end surprises.
    return text.replace("\r\n", "\n").strip("\n")


def _jinja() -> tuple[Any, Any]:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise MissingExtraError(
            "the report page needs jinja2, which is not installed: pip install 'lccost[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _asset(f"templates/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment, Markup
