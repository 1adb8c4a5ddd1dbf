"""The report as a workbook: raw data, and a cost sheet whose formulas stay alive."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from costmodel.errors import MissingExtraError
from reports.comparison import Pair
from reports.figures.style import source_date
from reports.labels import safe_text
from reports.ranking import does_not_fit, rank
from reports.report import Report
from reports.tables import Table

#: Written where no date is given: a workbook must have one.
_NO_DATE = datetime(1980, 1, 1, tzinfo=UTC)
_SECONDS_PER_HOUR = 3600.0
_HOURS_PER_MONTH = 730.0
#: Rows above the cost table: title, hint, blank, inputs.
_FIRST_INPUT_ROW = 3
_COST_COLUMNS = (
    *("method", "level", "model", "device", "GPUs", "context (tokens)", "batch", "fits"),
    *("tokens/s (predicted)", "US$ per GPU-hour", "US$ per million output tokens"),
    *("million tokens per month", "US$ per month", "accuracy lost (points)", "basis"),
)


def to_xlsx(report: Report) -> bytes:
    """Sheets: summary, cost (live formulas), one a table. Names are text, never formulas."""
    try:
        import xlsxwriter
    except ImportError:
        raise MissingExtraError(
            "workbooks need xlsxwriter, which is not installed: pip install 'lccost[excel]'"
        ) from None
    out = io.BytesIO()
    options = {
        "in_memory": True,
        "strings_to_formulas": False,
        "strings_to_urls": False,
        "strings_to_numbers": False,
        "nan_inf_to_errors": False,
    }
    with xlsxwriter.Workbook(out, options) as book:
        book.set_properties(
            {"title": safe_text(report.title, 200), "created": source_date() or _NO_DATE}
        )
        formats = {
            "head": book.add_format({"bold": True, "bottom": 1, "text_wrap": True}),
            "title": book.add_format({"bold": True, "font_size": 14}),
            "wrap": book.add_format({"text_wrap": True, "valign": "top"}),
            "input": book.add_format({"bg_color": "#FFF2CC", "border": 1, "num_format": "0.00##"}),
            "money": book.add_format({"num_format": "#,##0.00"}),
            "number": book.add_format({"num_format": "#,##0.###"}),
        }
        _summary(book.add_worksheet("Summary"), report, formats)
        _cost(book.add_worksheet("Cost"), report, formats)
        for name, table in (
            *(("Methods", report.ranking), ("Errors", report.errors)),
            ("Validation", report.validation),
            *(("Break-even", report.break_even), ("Sensitivity", report.sensitivity)),
            *(("Accuracy", report.accuracy), ("Hardware", report.provenance)),
            *(("Left out", report.left_out), ("Reproduce", report.reproduce)),
        ):
            if table.values:
                _sheet(book.add_worksheet(name), table, formats)
    return out.getvalue()


def _summary(sheet: Any, report: Report, formats: dict[str, Any]) -> None:
    sheet.set_column(0, 0, 110)
    sheet.write_string(0, 0, report.title, formats["title"])
    texts = [report.verdict, *report.remarks, "", "Assumptions", *report.assumptions]
    for n, text in enumerate(texts, start=2):
        sheet.write_string(n, 0, safe_text(text), formats["wrap"])


def _sheet(sheet: Any, table: Table, formats: dict[str, Any]) -> None:
    for n, column in enumerate(table.columns):
        sheet.write_string(0, n, column.name, formats["head"])
        sheet.set_column(n, n, 16 if column.is_number else 24)
    for row, record in enumerate(table.dicts(), start=1):
        for n, column in enumerate(table.columns):
            _cell(sheet, row, n, record[column.name], formats["number"])
    sheet.freeze_panes(1, 0)
    sheet.autofilter(0, 0, len(table.values), len(table.columns) - 1)


def _cell(sheet: Any, row: int, column: int, value: Any, number: Any) -> None:
    if value is None or value == "":
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        sheet.write_number(row, column, value, number)
    else:
        sheet.write_string(row, column, safe_text(str(value), 2000))


def _cost(sheet: Any, report: Report, formats: dict[str, Any]) -> None:
    """Inputs on top (price per device, utilisation); one row a predicted point below."""
    pairs = [r.pair for r in rank(report.pairs) if r.pair.value("tokens_per_s")]
    devices = list(dict.fromkeys(safe_text(p.key.device or "?", 60) for p in pairs))
    prices = {h.name: h.price_usd_per_hour for h in report.hardware}
    sheet.write_string(0, 0, "Cost", formats["title"])
    sheet.write_string(1, 0, "Change the yellow cells; everything below follows.")
    sheet.write_string(_FIRST_INPUT_ROW - 1, 0, "device", formats["head"])
    sheet.write_string(_FIRST_INPUT_ROW - 1, 1, "US$ per GPU-hour", formats["head"])
    known: dict[str, float | None] = {}
    for n, device in enumerate(devices):
        price = prices.get(device)
        known[device] = price[1] if price else None
        sheet.write_string(_FIRST_INPUT_ROW + n, 0, device)
        _input(sheet, _FIRST_INPUT_ROW + n, 1, known[device], formats["input"])
    busy_row = _FIRST_INPUT_ROW + len(devices)
    sheet.write_string(busy_row, 0, "share of time busy (0 to 1)")
    _input(sheet, busy_row, 1, 1.0, formats["input"])
    head = busy_row + 2
    for n, title in enumerate(_COST_COLUMNS):
        sheet.write_string(head, n, title, formats["head"])
        sheet.set_column(n, n, 22 if n in (0, 2, 3) else 14)
    # Excel counts rows from 1; the list of prices is absolute in every formula.
    names = f"$A${_FIRST_INPUT_ROW + 1}:$A${_FIRST_INPUT_ROW + len(devices)}"
    amounts = f"$B${_FIRST_INPUT_ROW + 1}:$B${_FIRST_INPUT_ROW + len(devices)}"
    for n, pair in enumerate(pairs, start=head + 1):
        _cost_row(sheet, n, pair, (names, amounts, f"$B${busy_row + 1}"), known, formats)
    if pairs:
        sheet.autofilter(head, 0, head + len(pairs), len(_COST_COLUMNS) - 1)
        sheet.freeze_panes(head + 1, 1)


def _cost_row(
    sheet: Any,
    row: int,
    pair: Pair,
    cells: Sequence[str],
    known: dict[str, float | None],
    formats: dict[str, Any],
) -> None:
    names, amounts, busy = cells
    device = safe_text(pair.key.device or "?", 60)
    gpus = pair.key.number("gpus") or pair.key.number("tp") or 1.0
    speed = pair.value("tokens_per_s") or 0.0
    texts = (
        *(safe_text(pair.key.method_spec, 80), pair.key.text("level")),
        *(safe_text(pair.key.text("model"), 80), device),
    )
    for n, text in enumerate(texts):
        sheet.write_string(row, n, text)
    numbers = (gpus, pair.key.number("context_tokens"), pair.key.number("batch"))
    for n, value in enumerate(numbers, start=4):
        _cell(sheet, row, n, value, formats["number"])
    sheet.write_string(row, 7, "no" if does_not_fit(pair) else "yes")
    sheet.write_number(row, 8, speed, formats["number"])
    at = row + 1
    price = known[device]
    per_million = (price or 0.0) * gpus / _SECONDS_PER_HOUR / speed * 1e6
    tokens = speed * _SECONDS_PER_HOUR * _HOURS_PER_MONTH / 1e6
    money, number = formats["money"], formats["number"]
    # The values beside the formulas are what viewers show that do not calculate.
    lookup = f"=INDEX({amounts},MATCH(D{at},{names},0))"
    sheet.write_formula(row, 9, lookup, money, price or 0.0)
    sheet.write_formula(row, 10, f"=J{at}*E{at}/3600/(I{at}*{busy})*1000000", money, per_million)
    sheet.write_formula(row, 11, f"=I{at}*{busy}*3600*730/1000000", number, tokens)
    sheet.write_formula(row, 12, f"=J{at}*E{at}*730", money, (price or 0.0) * gpus * 730.0)
    _cell(sheet, row, 13, pair.value("accuracy_drop_points"), number)
    sheet.write_string(row, 14, safe_text(pair.basis, 40))


def _input(sheet: Any, row: int, column: int, value: float | None, style: Any) -> None:
    if value is None:
        sheet.write_blank(row, column, None, style)
    else:
        sheet.write_number(row, column, value, style)
