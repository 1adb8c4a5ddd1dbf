"""The sheets of a plan's workbook; the cost sheet's formulas stay alive."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from reports.figures.style import source_date
from reports.labels import safe_text
from reports.tables import Table

Row = Mapping[str, Any]
#: Written where no date is given: a workbook must have one.
_NO_DATE = datetime(1980, 1, 1, tzinfo=UTC)
_HOURS_PER_MONTH = 730
_FIRST_PRICE = 4
_HEADS = (
    *("rank", "model", "method", "GPU", "GPUs", "output tokens/s", "input + output tokens/s"),
    *("US$/h", "US$/month", "US$ per million tokens", "accuracy lost (points)", "binds"),
)


def write_book(
    book: Any, document: Mapping[str, Any], held: Sequence[Row], tables: Mapping[str, Table]
) -> None:
    """Fill an open xlsxwriter workbook."""
    book.set_properties({"title": "Capacity plan", "created": source_date() or _NO_DATE})
    formats = {
        "head": book.add_format({"bold": True, "bottom": 1, "text_wrap": True}),
        "title": book.add_format({"bold": True, "font_size": 14}),
        "wrap": book.add_format({"text_wrap": True, "valign": "top"}),
        "input": book.add_format({"bg_color": "#FFF2CC", "border": 1, "num_format": "0.00##"}),
        "money": book.add_format({"num_format": "#,##0.00"}),
        "number": book.add_format({"num_format": "#,##0.###"}),
    }
    summary = book.add_worksheet("Summary")
    summary.set_column(0, 0, 120)
    lines = [
        document["verdict"], "", *document["slo"], "", *document["explanations"], "",
        *document["definitions"], *document["assumptions"],
    ]  # fmt: skip
    summary.write_string(0, 0, "Capacity plan", formats["title"])
    for n, text in enumerate(lines, start=2):
        summary.write_string(n, 0, safe_text(str(text)), formats["wrap"])
    _cost(book.add_worksheet("Cost"), held, formats)
    for name, table in tables.items():
        if table.values:
            _sheet(book.add_worksheet(name), table, formats)


def _sheet(sheet: Any, table: Table, formats: Mapping[str, Any]) -> None:
    for n, column in enumerate(table.columns):
        sheet.write_string(0, n, column.title, formats["head"])
        sheet.set_column(n, n, 14 if column.is_number else 30)
    for row, values in enumerate(table.values, start=1):
        for n, value in enumerate(values):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                sheet.write_number(row, n, value, formats["number"])
            elif value is not None:
                sheet.write_string(row, n, safe_text(str(value), 2000))
    sheet.freeze_panes(1, 0)
    sheet.autofilter(0, 0, len(table.values), len(table.columns) - 1)


def _cost(sheet: Any, held: Sequence[Row], formats: Mapping[str, Any]) -> None:
    """Prices on top; rent per hour and month and per million tokens follow them."""
    names = list(dict.fromkeys(str(r["gpu"]) for r in held))
    price: dict[str, float] = {}
    for r in held:
        if r["usd_per_hour"] is not None:
            price.setdefault(str(r["gpu"]), r["usd_per_hour"] / r["gpus"])
    sheet.write_string(0, 0, "Cost", formats["title"])
    sheet.write_string(1, 0, "Change the yellow cells; everything below follows.")
    sheet.write_string(_FIRST_PRICE - 1, 0, "GPU", formats["head"])
    sheet.write_string(_FIRST_PRICE - 1, 1, "US$ per GPU-hour", formats["head"])
    for n, name in enumerate(names):
        sheet.write_string(_FIRST_PRICE + n, 0, safe_text(name, 60))
        if name in price:
            sheet.write_number(_FIRST_PRICE + n, 1, price[name], formats["input"])
        else:
            sheet.write_blank(_FIRST_PRICE + n, 1, None, formats["input"])
    first, last = _FIRST_PRICE + 1, _FIRST_PRICE + len(names)
    head = _FIRST_PRICE + len(names) + 1
    for n, title in enumerate(_HEADS):
        sheet.write_string(head, n, title, formats["head"])
        sheet.set_column(n, n, 26 if n in (1, 2, 3) else 14)
    lookup = f"$A${first}:$A${last}", f"$B${first}:$B${last}"
    for n, row in enumerate(held, start=head + 1):
        _cost_row(sheet, n, row, lookup, price, formats)


def _cost_row(
    sheet: Any,
    row: int,
    plan: Row,
    lookup: tuple[str, str],
    price: Mapping[str, float],
    formats: Mapping[str, Any],
) -> None:
    at = row + 1
    for n, key in ((1, "model"), (2, "method_spec"), (3, "gpu"), (11, "binds")):
        sheet.write_string(row, n, safe_text(str(plan[key]), 80))
    rent = price.get(str(plan["gpu"]), 0.0) * plan["gpus"]
    per_million = plan["usd_per_million_tokens"]
    every = 0.0
    if per_million and plan["usd_per_hour"]:
        every = plan["usd_per_hour"] / 3600.0 / per_million * 1e6
    numbers = ((0, plan["rank"]), (4, plan["gpus"]), (5, plan["output_tokens_per_s"]), (6, every))
    for n, value in numbers:
        sheet.write_number(row, n, value or 0.0, formats["number"])
    names, amounts = lookup
    money = formats["money"]
    # The values beside the formulas are what viewers show that do not calculate.
    formula = f"=INDEX({amounts},MATCH(D{at},{names},0))*E{at}"
    sheet.write_formula(row, 7, formula, money, rent)
    sheet.write_formula(row, 8, f"=H{at}*{_HOURS_PER_MONTH}", money, rent * _HOURS_PER_MONTH)
    value = rent / 3600.0 / every * 1e6 if every else 0.0
    sheet.write_formula(row, 9, f"=IF(G{at}>0,H{at}/3600/G{at}*1000000,0)", money, value)
    drop = plan["accuracy_drop_points"]
    if drop is not None:
        sheet.write_number(row, 10, drop, formats["number"])
